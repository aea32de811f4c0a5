"""Update rules: a step of all tensors, and its adjoint, one by one by the formulas of csrc/include/mtml/update.h.

sgd      b' = momentum b + (1 - dampening) g  (first step: b' = g)      d = b', nesterov: g + momentum b'
adam     m' = beta1 m + (1 - beta1) g     v' = beta2 v + (1 - beta2) g^2    d = B1 m' / (sqrt(B2 v' + root) + eps)
rmsprop  v' = beta2 v + (1 - beta2) g^2   a' = beta2 a + (1 - beta2) g (centered)
         q  = g / (sqrt(v' - a'^2 + root) + eps)                        d = q, momentum: b' = momentum b + q
theta' = theta - alpha d,     Bi = 1 / (1 - betai^t)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.schedule.call import Part, by_role, by_tensor
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, summed, wide
from mtml_kernels.schedule.torch_kernels.rules import Adjoint, Direction, Numbers

__all__ = ["UPDATE"]


def _step(part: Part, theta: Tensor, g: Tensor, alpha: Tensor) -> Results:
    return (torch.addcmul(wide(theta), g, alpha, value=-1),)


def _direction(part: Part, lam: Tensor, alpha: Tensor) -> Results:
    return (lam * -alpha,)


def _rule(part: Part, *operands: Tensor | None) -> Results:
    *planes, hyper = operands
    assert hyper is not None
    numbers = Numbers(part.constants, hyper)
    return tuple(by_role([_rule_step(numbers, *tensor) for tensor in by_tensor(planes, 6)]))


def _rule_step(numbers: Numbers, theta: Any, g: Any, alpha: Any, *s: Tensor | None) -> Sequence[Tensor | None]:
    theta = wide(theta)
    done = Direction(numbers, theta, g, s)
    if numbers.spec.decayed and numbers.spec.decoupled:
        theta = theta - theta * (alpha * numbers.of["weight_decay"])
    after = torch.addcmul(theta, done.d, alpha, value=-1)
    return after, *done.moments, *[None] * (3 - len(done.moments))


def _adjoint(part: Part, *operands: Tensor | None) -> Results:
    *planes, hyper = operands
    assert hyper is not None
    numbers, tensors = Numbers(part.constants, hyper), by_tensor(planes, 10)
    *_, counting = part.wants
    rates = part.wants[5 * len(tensors) : -1]
    every = [_adjoint_step(numbers, counting, want, *own) for want, own in zip(rates, tensors, strict=True)]
    *found, dhyper = zip(*every, strict=True)
    total = torch.stack(dhyper).sum(0) if counting else None
    return *(plane for role in found for plane in role), total


def _adjoint_step(
    numbers: Numbers, dhyper: bool, dalpha: bool, theta: Any, g: Any, alpha: Any, s0: Tensor | None,
    s1: Tensor | None, s2: Tensor | None, lam: Tensor | None, *mu: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    lam = torch.zeros_like(g) if lam is None else lam
    theta, s = wide(theta), (s0, s1, s2)
    dbar = lam * -alpha
    back = Adjoint(Direction(numbers, theta, g, s), s, mu, dbar, dhyper)
    of_rate = back.done.d
    if numbers.spec.decayed:
        decay = numbers.of["weight_decay"]
        if numbers.spec.decoupled:
            below, of_rate = lam + dbar * decay, of_rate + theta * decay
            back.count("weight_decay", lambda: theta * dbar)
        else:
            below = lam + back.g * decay
            back.count("weight_decay", lambda: theta * back.g)
    else:
        below = lam.clone()  # sums are taken in it
    rate = -summed(of_rate * lam, alpha.shape) if dalpha else None
    return back.g, below, *back.before, rate, back.hyper() if dhyper else None


UPDATE: dict[str, TorchKernel] = {
    "update.step": _step,
    "update.direction": _direction,
    "update.rule": _rule,
    "update.adjoint": _adjoint,
}
