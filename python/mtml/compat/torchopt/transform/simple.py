"""Transformations that scale, decay, accumulate or mask updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml.compat.rate import number
from mtml.compat.torchopt import pytree
from mtml.compat.torchopt.base import (
    GradientTransformation,
    Kernel,
    Leaves,
    identity,
    kernel_of,
    transformation,
)
from mtml.compat.torchopt.transform.leaves import (
    Tensors,
    added,
    counted,
    present,
    put,
    scaled,
    settled,
    zero_counts,
    zeros,
)
from mtml_kernels.checks import check_number, shown

__all__ = [
    "Decay",
    "MaskedState",
    "NanToNum",
    "Scale",
    "ScaleBySchedule",
    "ScaleByScheduleState",
    "Trace",
    "TraceState",
    "add_decayed_weights",
    "at_least",
    "decay",
    "masked",
    "nan_to_num",
    "scale",
    "scale_by_schedule",
    "trace",
]

Mask = Any  # a tree of bools, or a function of the list of parameters that returns one


def at_least(name: str, value: Any, least: float = 0.0) -> None:
    """Raise ValueError for a number below, TypeError for what is none."""
    if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name}: expected a number of at least {least:g}, got {shown(value)}")
    if not (value.detach() if isinstance(value, Tensor) else float(value)) >= least:
        raise ValueError(f"{name}: expected a number of at least {least:g}, got {value}")


@dataclass(frozen=True, eq=False)
class Scale(Kernel):
    """factor * updates; a tensor is read at every step, so that it may be learnt."""

    size: float | Tensor
    negative: bool = False

    @property
    def factor(self) -> float | Tensor:
        return -self.size if self.negative else self.size

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        return settled(grads, put(grads, at, scaled([grads[i] for i in at], self.factor)), inplace), state


def scale(step_size: float | Tensor) -> GradientTransformation:
    """Multiply updates by a number."""
    return transformation(Scale(number(step_size)))


class ScaleByScheduleState(NamedTuple):
    count: Leaves  # type: ignore[assignment]  # the original's name, a method of tuples


@dataclass(frozen=True, eq=False)
class ScaleBySchedule(Kernel):
    schedule: Callable[[Any], Any]
    negative: bool = False

    def start(self, params: Leaves) -> ScaleByScheduleState:
        return ScaleByScheduleState(zero_counts(params))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        sizes = {id(state.count[i]): number(self.schedule(state.count[i])) for i in at}
        factors = [-sizes[id(state.count[i])] if self.negative else sizes[id(state.count[i])] for i in at]
        found = [scaled([grads[i]], factor)[0] for i, factor in zip(at, factors, strict=True)]
        return settled(grads, put(grads, at, found), inplace), ScaleByScheduleState(counted(state.count, at)[0])


def scale_by_schedule(step_size_fn: Callable[[Any], Any]) -> GradientTransformation:
    """Multiply updates by a function of the number of steps taken, which it gets as an integer tensor."""
    return transformation(ScaleBySchedule(step_size_fn))


class TraceState(NamedTuple):
    trace: Leaves
    fresh: Leaves = ()  # whether nothing has been added to it yet


@dataclass(frozen=True, eq=False)
class Trace(Kernel):
    momentum: float
    dampening: float = 0.0
    nesterov: bool = False
    moment_requires_grad: bool = False

    def start(self, params: Leaves) -> TraceState:
        return TraceState(zeros(params, self.moment_requires_grad), [True] * len(params))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        fresh = list(getattr(state, "fresh", ())) or [False] * len(grads)  # the original's has none
        given, old = [grads[i] for i in at], [state.trace[i] for i in at]
        entering = given
        if self.dampening:
            entering = list(scaled(given, [1.0 if fresh[i] else 1.0 - self.dampening for i in at]))
        new = added(scaled(old, [1.0 if fresh[i] else self.momentum for i in at]), entering)
        found = added(given, new, self.momentum) if self.nesterov else new
        kept = settled(state.trace, put(state.trace, at, new), inplace)
        updates = settled(grads, put(grads, at, found), inplace)
        return updates, TraceState(kept, put(fresh, at, [False] * len(at)))


def trace(
    momentum: float = 0.9, dampening: float = 0.0, nesterov: bool = False, moment_requires_grad: bool = False
) -> GradientTransformation:
    """Momentum as in torch.optim.SGD: the first update enters whole, later ones less `dampening`.

    Args:
        moment_requires_grad: the zeros that it begins with are leaves that require grad.
    """
    at_least("momentum", momentum)
    check_number("dampening", dampening)
    if nesterov and (momentum <= 0.0 or dampening != 0.0):
        raise ValueError(
            f"nesterov: expected a momentum above 0 and a dampening of 0 with it, got {momentum} and {dampening}"
        )
    if momentum == 0.0:
        return identity()
    return transformation(Trace(momentum, dampening, nesterov, moment_requires_grad))


@dataclass(frozen=True, eq=False)
class Decay(Kernel):
    """updates (negated to maximize) + weight_decay * parameters."""

    weight_decay: float
    maximize: bool = False

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        found: Tensors = [grads[i] for i in at]
        if self.maximize:
            found = scaled(found, -1.0)
        if self.weight_decay:
            if params is None:
                raise ValueError("params: weight decay needs the parameters: update(updates, state, params=params)")
            # in place the updates stay what they were to autograd
            own = [params[i].detach() if inplace and not grads[i].requires_grad else params[i] for i in at]
            found = added(found, own, self.weight_decay)
        return settled(grads, put(grads, at, found), inplace), state


def decay(weight_decay: float = 0.0, maximize: bool = False) -> GradientTransformation:
    """Turn the sign to maximize, then add weight_decay * parameters."""
    at_least("weight_decay", weight_decay)
    return transformation(Decay(weight_decay, maximize)) if maximize or weight_decay else identity()


def add_decayed_weights(weight_decay: float = 0.0, mask: Mask = None) -> GradientTransformation:
    """Add weight_decay * parameters to the updates, of those that the mask names (as in `masked`)."""
    return decay(weight_decay) if mask is None else masked(decay(weight_decay), mask)


class MaskedState(NamedTuple):
    inner_state: Any


class _Masked(Kernel):
    """Shows the inner transformation None where the mask is False."""

    def __init__(self, inner: GradientTransformation, mask: Mask) -> None:
        kernel = kernel_of(inner)
        if kernel is None:
            raise TypeError("inner: expected a transformation of this library; mask your own functions by yourself")
        self.kernel, self.mask = kernel, mask

    def _bools(self, like: Leaves) -> list[bool]:
        mask = self.mask(list(like)) if callable(self.mask) else self.mask
        found = pytree.tree_leaves(mask)
        if len(found) == 1:
            found *= len(like)
        if len(found) != len(like):
            raise ValueError(f"mask: expected one bool, or one for each of {len(like)} parameters, got {len(found)}")
        return found

    def _shown(self, leaves: Leaves, like: Leaves) -> list[Any]:
        return [leaf if on else None for leaf, on in zip(leaves, self._bools(like), strict=True)]

    def start(self, params: Leaves) -> MaskedState:
        return MaskedState(self.kernel.start(self._shown(params, params)))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        like = grads if params is None else params
        own = None if params is None else self._shown(params, like)
        found, inner = self.kernel.step(self._shown(grads, like), state.inner_state, own, inplace)
        chosen = zip(found, grads, self._bools(like), strict=True)
        return [new if on else old for new, old, on in chosen], MaskedState(inner)


def masked(inner: GradientTransformation, mask: Mask = None) -> GradientTransformation:
    """Apply a transformation to some updates only.

    Args:
        inner: the transformation.
        mask: a tree of bools like the parameters; or a function that gets the list of parameters and returns one; or
            one bool for all.
    """
    return transformation(_Masked(inner, True if mask is None else mask))


@dataclass(frozen=True, eq=False)
class NanToNum(Kernel):
    nan: float
    posinf: float | None
    neginf: float | None

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        new = [None if g is None else torch.nan_to_num(g, self.nan, self.posinf, self.neginf) for g in grads]
        return settled(grads, new, inplace), state


def nan_to_num(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> GradientTransformation:
    """Put numbers in the place of NaN and the infinities."""
    return transformation(NanToNum(nan, posinf, neginf))
