"""Operands as the kernels of rows and sums take them: addresses, strides that are 0 along what is broadcast, types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.torch_kernels.common import wide_dtype

__all__ = ["OPTIONS", "Results", "new", "power", "shape_of", "spread", "strides", "tasks_by_rows", "type_of"]

Results = tuple[Tensor | None, ...]
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}  # every variant of a kernel is to round alike


def type_of(x: Tensor) -> Any:
    """The type in which numbers of a plane are computed."""
    return tl.float64 if wide_dtype(x.dtype) == torch.float64 else tl.float32


def power(n: int, most: int) -> int:
    """The next power of two, up to `most`, which is one."""
    return min(1 << max(0, n - 1).bit_length(), most)


def new(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result, in the type of sums by default."""
    return torch.empty(tuple(shape), dtype=dtype or wide_dtype(like.dtype), device=like.device)


def shape_of(*operands: Tensor | None) -> tuple[int, ...]:
    """The shape to which they broadcast."""
    return tuple(torch.broadcast_shapes(*(t.shape for t in operands if t is not None)))


def spread(shape: Sequence[int], *operands: Tensor | None) -> list[Tensor | None]:
    """The operands in a common shape, without copying."""
    return [t if t is None or t.shape == tuple(shape) else t.expand(tuple(shape)) for t in operands]


def tasks_by_rows(shape: Sequence[int], *operands: Tensor | None) -> list[Tensor | None]:
    """The operands [T, N, R, F] as [T, N R, F]: views, but for odd strides."""
    return [None if t is None else t.flatten(1, 2) for t in spread(shape, *operands)]


def strides(operand: Tensor | None, dims: int) -> tuple[int, ...]:
    """Zeros of an absent one."""
    return (0,) * dims if operand is None else operand.stride()
