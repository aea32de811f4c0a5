"""The rates of a recognised inner loop as MAML takes them: numbers, or tensors made anew from what the steps read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.mapped.recognise import Rate
from mtml_kernels.precision import first_floating

__all__ = ["rates_of"]

Steps = Sequence[Rate]


def rates_of(
    rates: Sequence[Mapping[str, Rate]],
    shapes: Mapping[str, torch.Size],
    factor: float,
    now: Callable[[Tensor], Tensor],
) -> Any:
    """One rate for all tensors where they have one, else {name: rate}; each a number, a tensor, or one for every step.

    Args:
        rates: {name: rate} of every step. shapes: of the adapted tensors. factor: of the support loss.
        now: what stands for a tensor of the recorded run.
    """
    columns = {name: [step[name] for step in rates] for name in rates[0]}
    names = list(columns)
    if len({_key(steps) for steps in columns.values()}) == 1:
        one = _of_steps(columns[names[0]], factor, now)
        if not isinstance(one, Tensor) or one.ndim == (0 if _same(columns[names[0]]) else 1):
            return one
    found = {name: _of_steps(steps, factor, now) for name, steps in columns.items()}
    return {name: _shaped(rate, columns[name], shapes[name]) for name, rate in found.items()}


def _key(steps: Steps) -> Hashable:
    return tuple(rate.number if rate.number is not None else (rate.update.form, *map(id, rate.reads)) for rate in steps)


def _same(steps: Steps) -> bool:
    return len({_key([rate]) for rate in steps}) == 1


def _of_steps(steps: Steps, factor: float, now: Callable[[Tensor], Tensor]) -> Any:
    """The rate of one tensor, as it comes: a number, [...], or [K, ...]."""
    if _same(steps):
        return _one(steps[0], factor, now)
    values = [_one(rate, factor, now) for rate in steps]
    tensors = [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in values]
    return torch.stack(list(torch.broadcast_tensors(*tensors)))


def _one(rate: Rate, factor: float, now: Callable[[Tensor], Tensor]) -> Any:
    if rate.number is not None:
        return rate.number * factor
    reads = [now(t) for t in rate.reads]
    if rate.itself and factor == 1.0:
        return reads[0]
    like = first_floating(reads)
    value = -rate.update(like.new_zeros(()), like.new_ones(()), *reads)
    return value if factor == 1.0 else factor * value


def _shaped(rate: Any, steps: Steps, shape: torch.Size) -> Any:
    """With the dimensions that MAML tells the forms of rates by."""
    if not isinstance(rate, Tensor):
        return rate
    if _same(steps):
        return rate if rate.ndim == 0 else rate.expand(shape)
    if rate.ndim == 1:
        return rate.reshape(-1, *(1 for _ in shape))
    return rate.expand(len(steps), *shape)
