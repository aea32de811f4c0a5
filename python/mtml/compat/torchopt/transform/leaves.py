"""Arithmetic on lists of tensors, in one call for all of them where no transform of torch.func is around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.rate import scalar
from mtml.compat.torchopt.base import Leaves
from mtml_kernels.transforms import under_transform

__all__ = [
    "Tensors",
    "added",
    "counted",
    "divided",
    "present",
    "products",
    "put",
    "scaled",
    "settled",
    "zero_counts",
    "zeros",
]

Tensors = list[Tensor] | tuple[Tensor, ...]
Factor = float | Tensor | Sequence[float]


def present(grads: Leaves) -> list[int]:
    """Positions of what is not None."""
    return [i for i, grad in enumerate(grads) if grad is not None]


def put(old: Leaves, at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """The list with new values at these positions."""
    found = list(old)
    for i, value in zip(at, new, strict=True):
        found[i] = value
    return found


def settled(old: Leaves, new: list[Any], inplace: bool) -> list[Any]:
    """`new`; with `inplace` in the tensors that `old` has."""
    if not inplace:
        return new
    for before, after in zip(old, new, strict=True):
        if before is not None and before is not after:
            before.copy_(after)
    return list(old)


def added(x: Tensors, y: Tensors, alpha: float = 1.0) -> Tensors:
    """x + alpha y."""
    if under_transform() or not x:
        return [a.add(b, alpha=alpha) for a, b in zip(x, y, strict=True)]
    return torch._foreach_add(x, y, alpha=alpha)


def scaled(x: Tensors, factor: Factor) -> Tensors:
    """factor x; one factor, or one for each."""
    if isinstance(factor, Tensor):
        rate: Tensor = scalar(factor)  # [1] would give a parameter without dimensions one
        return [rate.to(a.device, a.dtype) * a for a in x]
    each = list(factor) if isinstance(factor, Sequence) else [float(factor)] * len(x)
    if under_transform() or not x:
        return [a * b for a, b in zip(x, each, strict=True)]
    return torch._foreach_mul(x, each)


def divided(x: Tensors, y: Tensors) -> Tensors:
    """x / y."""
    if under_transform() or not x:
        return [a / b for a, b in zip(x, y, strict=True)]
    return torch._foreach_div(x, y)


def products(x: Tensors, y: Tensors) -> Tensors:
    """x y."""
    if under_transform() or not x:
        return [a * b for a, b in zip(x, y, strict=True)]
    return torch._foreach_mul(x, y)


def zeros(params: Leaves, requires_grad: bool = False) -> list[Any]:
    """A zero moment for each parameter."""
    return [None if p is None else torch.zeros_like(p, requires_grad=requires_grad) for p in params]


def zero_counts(params: Leaves) -> list[Any]:
    """A count of steps for each parameter: one tensor for all, on the CPU, where reading it waits for nothing."""
    zero = torch.zeros((), dtype=torch.int64)
    return [None if p is None else zero for p in params]


def counted(counts: Leaves, at: Sequence[int]) -> tuple[list[Any], list[int]]:
    """(the counts with those at `at` one higher, these as numbers)."""
    seen: dict[int, tuple[Tensor, int]] = {}
    for i in at:
        if id(counts[i]) not in seen:
            number = int(counts[i]) + 1
            seen[id(counts[i])] = torch.tensor(number, dtype=torch.int64), number
    new = [seen[id(counts[i])] for i in at]
    return put(counts, at, [tensor for tensor, _ in new]), [number for _, number in new]
