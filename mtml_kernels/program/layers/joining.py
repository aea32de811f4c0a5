"""Joining tensors, repeating them, and what changes nothing: copies and conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtml_kernels.program.builder import Builder
from mtml_kernels.program.layers.shapes import unsqueeze
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op, OpInfo, operation
from mtml_kernels.program.values import BatchSize, SameType, Value, as_int, dimension, listed, tensor, without_lead
from mtml_kernels.program.vocabulary import function

__all__: list[str] = []

operation(OpInfo(Op.CAT, "cat", lambda g: torch.cat([*g.operands], dim=-1), operands=2))
operation(OpInfo(Op.EXPAND, "expand", lambda g: g.operands[0].expand(g.shape)))


@function(torch.cat, torch.concat, torch.concatenate)
def _cat(b: Builder, tensors: Any, dim: int = 0, *, axis: int | None = None) -> Any:
    values = [tensor(t) for t in tensors]
    return b.cat(values, dimension(values[0], dim if axis is None else axis))


@function(torch.stack)
def _stack(b: Builder, tensors: Any, dim: int = 0) -> Any:
    values = [tensor(t) for t in tensors]
    at = dimension(values[0], dim, extra=1)
    return b.cat([unsqueeze(b, value, at) for value in values], at)


@function(torch.broadcast_to, only_methods="expand")
def _expand(b: Builder, input: Any, *size: Any) -> Any:
    value, sizes = tensor(input), listed(size)
    if value.batched:
        if len(sizes) == value.ndim and all(s in (-1, have) for s, have in zip(sizes, value.sizes(), strict=True)):
            return value
        raise Cannot("expanding a value of each sample is not fused; addition and multiplication broadcast it")
    if sizes and isinstance(sizes[0], BatchSize):
        tail = (1,) * (len(sizes) - 1 - value.ndim) + without_lead(value, len(sizes))
        wanted = [have if s == -1 else as_int(s) for s, have in zip(sizes[1:], tail, strict=True)]
        return b.expand(value, sizes[0].times, tuple(wanted))
    return _expand_unbatched(b, value, sizes)


def _expand_unbatched(b: Builder, value: Value, sizes: Sequence[Any]) -> Value:
    tail = (1,) * (len(sizes) - value.ndim) + value.shape
    if len(tail) != len(sizes) or any(s not in (-1, have) for s, have in zip(sizes, tail, strict=True)):
        raise Cannot("expanding a parameter to a fixed size is not fused; + and * broadcast, x.shape[0] expands")
    return b.reshape(value, 0, tail)


@function(only_methods="expand_as")
def _expand_as(b: Builder, input: Any, other: Any) -> Any:
    return _expand(b, input, *tensor(other).sizes())


@function(only_methods="repeat")
def _repeat(b: Builder, input: Any, *repeats: Any) -> Any:
    value, times = tensor(input), listed(repeats)
    have = [1] * (len(times) - value.ndim) + list(value.sizes())
    sizes: list[Any] = []
    for size, n in zip(have, times, strict=True):
        if n != 1 and size != 1:
            raise Cannot("repeating a tensor along a dimension longer than 1 is not fused")
        sizes.append(size if n == 1 else n)
    return b.copy(_expand(b, value, *sizes))


@function(methods="clone")
def _copy(b: Builder, input: Any, *, memory_format: Any = None) -> Any:
    return b.copy(tensor(input))


@function(only_methods="contiguous")
def _same(b: Builder, input: Any, *, memory_format: Any = None) -> Any:
    return tensor(input)


@function(only_methods="to type_as")
def _convert(b: Builder, input: Any, *to: Any, **options: Any) -> Any:
    """`.to(x.dtype)`, `.to(x.device)`, `.type_as(x)`: the tensors of a fused call agree in both."""
    changes = [x for x in (*to, *options.values()) if not isinstance(x, SameType | Value | bool)]
    if changes:
        raise Cannot(f"a conversion to {changes[0]} is not fused (to another tensor's dtype or device it is)")
    return tensor(input)
