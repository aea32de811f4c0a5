"""Inner optimisers: what an inner step does with the gradient, differentiable in everything, by torch.optim's formulas.

>>> import torch, mtml
>>> model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
>>> maml = mtml.MAML(model, lr=0.001, steps=5, loss="mse", update=mtml.inner.Adam(clip_norm=1.0))
>>> x, y = torch.randn(25, 10, 1), torch.randn(25, 10, 1)
>>> maml.meta_loss(x, y, x, y).mean().backward()

Their numbers are plain numbers, or tensors, to which the meta-gradient then flows; an nn.Parameter is registered, so
that `maml.parameters()` has it. The rate is MAML's `lr`, in every form that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from mtml_kernels.checks import shown
from mtml_kernels.reference.update import update
from mtml_kernels.schema.update import HYPERS, PLAIN, UpdateSpec

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "Rule"]

Number = float | Tensor
Params = dict[str, Tensor]


class Rule(nn.Module):
    """An update rule with its numbers; see `SGD`, `Adam`, `AdamW` and `RMSprop`.

    Called as every update rule of MAML is: rule(params, grads, lr, step, state) -> (params, state), all dicts by name.
    """

    def __init__(self, spec: UpdateSpec, **numbers: Number) -> None:
        super().__init__()
        self.spec = spec
        self.names = tuple(numbers)
        self._vector: tuple[Any, Tensor] | None = None
        for name, value in numbers.items():
            setattr(self, name, value)

    def numbers(self) -> dict[str, Number]:
        """The rule's numbers by the names of `mtml_kernels.schema.update.HYPERS`."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def plain(self) -> bool:
        """Whether it is gradient descent, whatever its numbers."""
        return self.spec == PLAIN

    def vector(self, device: torch.device) -> Tensor:
        """All numbers in the engine's order, [8] float64; made anew only where one of them is a tensor."""
        numbers = self.numbers()
        if not is_compiling() and not any(isinstance(value, Tensor) for value in numbers.values()):
            key = (device, *numbers.values())
            if self._vector is None or self._vector[0] != key:
                values = [float(numbers.get(name, 0.0)) for name in HYPERS]
                self._vector = key, torch.tensor(values, dtype=torch.float64, device=device)
            return self._vector[1]
        one = torch.ones((), dtype=torch.float64, device=device)
        parts = (numbers.get(name, 0.0) for name in HYPERS)  # as factors numbers are inputs of a compiled graph
        return torch.stack([part.to(one) if isinstance(part, Tensor) else one * part for part in parts])

    def __call__(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: Mapping[str, Tensor],
        step: int,
        state: Any = None,
    ) -> tuple[Params, Any]:
        """One step; `state` is what the step before returned, None at first."""
        names = list(params)
        theta = [params[name] for name in names]
        if state is None:
            state = {"step": 0, **{m: {n: torch.zeros_like(params[n]) for n in names} for m in self.spec.moments}}
        moments = [[state[moment][name] for name in names] for moment in self.spec.moments]
        after, kept = update(
            self.spec,
            self.numbers(),
            theta,
            [grads[name] for name in names],
            [lr[name] for name in names],
            moments,
            state["step"],
        )
        found = {m: dict(zip(names, kept[i], strict=True)) for i, m in enumerate(self.spec.moments)}
        return dict(zip(names, after, strict=True)), {"step": state["step"] + 1, **found}

    def extra_repr(self) -> str:
        text = {name: shown(v) if isinstance(v, Tensor) else v for name, v in self.numbers().items()}
        return ", ".join(f"{name}={value}" for name, value in text.items())


class SGD(Rule):
    """Gradient descent, with momentum: torch.optim.SGD.

    Args:
        momentum: of the buffer b' = momentum b + (1 - dampening) g; 0 keeps none.
        dampening: how much less of a gradient the buffer takes, but for the first.
        nesterov: step along g + momentum b'.
        weight_decay: adds weight_decay theta to the gradient.
        clip_norm: scales each task's gradient, all adapted tensors together, to a norm of at most this.

    Raises:
        TypeError: what is neither a number nor a scalar tensor.
        ValueError: a number outside its range.

    Example:
        >>> rule = SGD(momentum=0.9, nesterov=True)
        >>> rule.numbers()["momentum"]
        0.9

    Paper: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", 2013.
    """

    def __init__(
        self,
        momentum: Number = 0.0,
        dampening: Number = 0.0,
        nesterov: bool = False,
        weight_decay: Number = 0.0,
        *,
        clip_norm: Number | None = None,
    ) -> None:
        _check("momentum", momentum, 0.0)
        _check("dampening", dampening, -math.inf)
        _check("weight_decay", weight_decay, 0.0)
        spec = UpdateSpec("sgd", momentum=_given(momentum), nesterov=nesterov, **_flags(weight_decay, clip_norm))
        super().__init__(spec, momentum=momentum, dampening=dampening, weight_decay=weight_decay, **_clip(clip_norm))


class Adam(Rule):
    """Adam: torch.optim.Adam.

    Args:
        betas: decay of the means of the gradient and of its square.
        eps: added to the root of the mean square.
        eps_root: added under it.
        weight_decay: adds weight_decay theta to the gradient.
        clip_norm: scales each task's gradient, all adapted tensors together, to a norm of at most this.

    A gradient that is exactly zero moves nothing and has finite derivatives: the root's derivative at 0 is taken as 0.

    Raises:
        TypeError: what is neither a number nor a scalar tensor.
        ValueError: a number outside its range.

    Example:
        >>> Adam(betas=(0.9, 0.99)).numbers()["beta2"]
        0.99

    Paper: Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015 (arXiv:1412.6980).
    """

    decoupled = False

    def __init__(
        self,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        eps_root: Number = 0.0,
        weight_decay: Number = 0.0,
        *,
        clip_norm: Number | None = None,
    ) -> None:
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            _check(name, beta, 0.0, 1.0)
        for name, value in (("eps", eps), ("eps_root", eps_root), ("weight_decay", weight_decay)):
            _check(name, value, 0.0)
        numbers = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}
        spec = UpdateSpec("adam", decoupled=self.decoupled, **_flags(weight_decay, clip_norm))
        super().__init__(spec, **numbers, **_clip(clip_norm))


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters by themselves: torch.optim.AdamW.

    Args and errors as in `Adam`; weight_decay multiplies theta by 1 - lr weight_decay, before the step.

    Example:
        >>> AdamW().numbers()["weight_decay"]
        0.01

    Paper: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101).
    """

    decoupled = True

    def __init__(
        self,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        eps_root: Number = 0.0,
        weight_decay: Number = 0.01,
        *,
        clip_norm: Number | None = None,
    ) -> None:
        super().__init__(betas, eps, eps_root, weight_decay, clip_norm=clip_norm)


class RMSprop(Rule):
    """RMSprop: torch.optim.RMSprop.

    Args:
        alpha: decay of the mean square.
        eps: added to its root.
        momentum: of a buffer of the scaled gradients; 0 keeps none.
        centered: divide by the deviation from the mean gradient.
        weight_decay: adds weight_decay theta to the gradient.
        clip_norm: scales each task's gradient, all adapted tensors together, to a norm of at most this.

    Raises:
        TypeError: what is neither a number nor a scalar tensor.
        ValueError: a number outside its range.

    Example:
        >>> RMSprop(alpha=0.9, centered=True).spec.moments
        ('square_avg', 'grad_avg')

    Paper: Hinton, "Neural Networks for Machine Learning", lecture 6, 2012; centred: Graves 2013 (arXiv:1308.0850).
    """

    def __init__(
        self,
        alpha: Number = 0.99,
        eps: Number = 1e-8,
        momentum: Number = 0.0,
        centered: bool = False,
        weight_decay: Number = 0.0,
        *,
        clip_norm: Number | None = None,
    ) -> None:
        _check("alpha", alpha, 0.0, 1.0)
        for name, value in (("eps", eps), ("momentum", momentum), ("weight_decay", weight_decay)):
            _check(name, value, 0.0)
        spec = UpdateSpec("rmsprop", momentum=_given(momentum), centered=centered, **_flags(weight_decay, clip_norm))
        numbers = {"beta2": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(spec, **numbers, **_clip(clip_norm))


def _given(value: Number) -> bool:
    return isinstance(value, Tensor) or value != 0.0


def _flags(weight_decay: Number, clip_norm: Number | None) -> dict[str, bool]:
    return {"clipped": clip_norm is not None, "decayed": _given(weight_decay)}


def _clip(norm: Number | None) -> dict[str, Number]:
    if norm is None:
        return {}
    _check("clip_norm", norm, 0.0)
    return {"clip_norm": norm}


def _check(name: str, value: Any, least: float, below: float = math.inf) -> None:
    """Raise where a number, or a scalar tensor that can be read, is outside [least, below)."""
    if isinstance(value, Tensor):
        if value.ndim or not value.is_floating_point():
            raise TypeError(f"{name}: expected a number or a scalar floating-point tensor, got {shown(value)}")
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number or a scalar tensor, got {shown(value)}")
    if not (-math.inf < value and least <= value < below):
        limits = "finite size" if least == -math.inf else f"at least {least:g}"
        limits += f" and below {below:g}" if below < math.inf else ""
        raise ValueError(f"{name}: expected a number of {limits}, got {value}")
