"""One inner step: from a task's gradients to its next parameters, by the formulas of torch.optim.

    g    = c grad,   c = min(1, clip_norm / (|grad| + 1e-6)) over all tensors at once   torch.nn.utils.clip_grad_norm_
    g    = g + weight_decay theta               or, decoupled, theta is shrunk by 1 - alpha weight_decay
    sgd      b' = momentum b + (1 - dampening) g  (the first step: b' = g)      d = b'  or, nesterov,  g + momentum b'
    adam     m' = beta1 m + (1 - beta1) g         v' = beta2 v + (1 - beta2) g^2
             d  = m' / (1 - beta1^t) / (sqrt(v' / (1 - beta2^t) + eps_root) + eps)
    rmsprop  v' = beta2 v + (1 - beta2) g^2       a' = beta2 a + (1 - beta2) g (centered, else 0)
             q  = g / (sqrt(v' - a'^2 + eps_root) + eps)                        d = q  or  b' = momentum b + q
    theta' = theta - alpha d

The square root has the derivative 0 where its argument is 0: a gradient that is exactly zero leaves no NaN behind.
Sutskever et al. 2013 (momentum), Kingma, Ba 2015 (arXiv:1412.6980), Loshchilov, Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtml_kernels.schema.update import UpdateSpec

__all__ = ["clip", "quotient", "root", "update"]

Numbers = Mapping[str, Tensor | float]


def _prepared(numbers: Numbers, step: int) -> Numbers:
    """The numbers, and what is made of them alone: as precisely as they are given, which torch.optim does too. In
    float32 1 - 0.999 is wrong in its sixth digit.
    """
    found = dict(numbers)
    for i in (1, 2):
        if f"beta{i}" in numbers:
            beta = numbers[f"beta{i}"]
            found[f"rest{i}"], found[f"bias{i}"] = 1.0 - beta, 1.0 - beta ** (step + 1)
    found["fresh"] = 1.0 - numbers.get("dampening", 0.0)
    return found


def root(x: Tensor) -> Tensor:
    """sqrt(x), with the derivative 0 at 0 and below."""
    above = x > 0
    return torch.where(above, torch.where(above, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def quotient(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is: without an eps, what has never had a gradient stays where it is."""
    return torch.where(y == 0, torch.zeros_like(x), x / torch.where(y == 0, torch.ones_like(y), y))


def clip(grads: Sequence[Tensor], norm: Tensor | float, tasks: bool = False) -> list[Tensor]:
    """All gradients of a task scaled to a norm of at most `norm`; `tasks`: of every task, [T, *shape]."""
    if not grads:  # nothing is adapted
        return []
    if not tasks:
        total = root(sum((g * g).sum() for g in grads))  # type: ignore[arg-type]
        scale = (norm / (total + 1e-6)).clamp(max=1.0)
        return [scale * g for g in grads]
    squares = torch.stack([(g * g).reshape(g.shape[0], g.shape[1:].numel()).sum(1) for g in grads]).sum(0)  # [T]
    scale = (norm / (root(squares) + 1e-6)).clamp(max=1.0)
    return [scale.view(-1, *(1,) * (g.ndim - 1)) * g for g in grads]


def update(
    spec: UpdateSpec,
    numbers: Numbers,
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    step: int,
    tasks: bool = False,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """One step of one task, or with `tasks` of every task, the tensors being [T, *shape].

    Args:
        spec: the rule.
        numbers: its hyper-parameters by the names of `schema.update.HYPERS`; those the rule has no use for may lack.
        theta, grads, rates: the adapted tensors, their gradients, and rates that broadcast to them.
        moments: for every name in `spec.moments` one tensor like each of `theta`; zeros before the first step.
        step: how many steps have been taken before this one, those of an earlier loop included.

    Returns:
        The next parameters and moments; differentiable any number of times.
    """
    numbers = _prepared(numbers, step)
    if spec.clipped:
        grads = clip(grads, numbers["clip_norm"], tasks)
    after: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in spec.moments]
    for i, (value, grad, rate) in enumerate(zip(theta, grads, rates, strict=True)):
        decay = numbers.get("weight_decay", 0.0) if spec.decayed else 0.0
        if spec.decayed and not spec.decoupled:
            grad = grad + decay * value
        direction, own = _direction(spec, numbers, grad, [plane[i] for plane in moments], step)
        if spec.decayed and spec.decoupled:
            value = value * (1.0 - rate * decay)
        # a tensor without dimensions would take over the precision of a number
        after.append((value - rate * direction).to(value.dtype))
        for plane, tensor in zip(kept, own, strict=True):
            plane.append(tensor.to(value.dtype))
    return after, kept


def _direction(
    spec: UpdateSpec, numbers: Numbers, grad: Tensor, moments: list[Tensor], step: int
) -> tuple[Tensor, list[Tensor]]:
    """(what the rate multiplies, the next moments) of one tensor."""
    if spec.rule == "adam":
        m = numbers["beta1"] * moments[0] + numbers["rest1"] * grad
        v = numbers["beta2"] * moments[1] + numbers["rest2"] * grad * grad
        spread = root(v / numbers["bias2"] + numbers.get("eps_root", 0.0))
        return quotient(m / numbers["bias1"], spread + numbers["eps"]), [m, v]
    if spec.rule == "rmsprop":
        return _rmsprop(spec, numbers, grad, moments)
    if not spec.momentum:
        return grad, []
    momentum = numbers["momentum"]
    buffer = grad if step == 0 else momentum * moments[0] + numbers["fresh"] * grad
    return (grad + momentum * buffer if spec.nesterov else buffer), [buffer]


def _rmsprop(spec: UpdateSpec, numbers: Numbers, grad: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    beta2, rest = numbers["beta2"], numbers["rest2"]
    square = beta2 * moments[0] + rest * grad * grad
    after, spread = [square], square
    if spec.centered:
        mean = beta2 * moments[1] + rest * grad
        after, spread = [square, mean], square - mean * mean
    scaled = quotient(grad, root(spread + numbers.get("eps_root", 0.0)) + numbers["eps"])
    if not spec.momentum:
        return scaled, after
    buffer = numbers["momentum"] * moments[-1] + scaled
    return buffer, [*after, buffer]
