"""What the kernels share: the precision of sums, broadcasting of tasks, sums over what was broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Results", "TorchKernel", "alike", "like", "summed", "tasks_of", "wide", "wide_dtype"]

Results: TypeAlias = tuple[Tensor | None, ...]
TorchKernel: TypeAlias = Callable[..., Results]  # (part, *operands)

_HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of such numbers are taken."""
    return torch.float32 if dtype in _HALF else dtype


def wide(x: Tensor) -> Tensor:
    """x in the type in which its sums are taken."""
    return x.float() if x.dtype in _HALF else x


def like(y: Tensor, x: Tensor) -> Tensor:
    """y in the type of x."""
    return y if y.dtype == x.dtype else y.to(x.dtype)


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the narrower type: what meets a plane of half precision becomes one."""
    if a.dtype == b.dtype:
        return a, b
    return (a, b.to(a.dtype)) if a.dtype in _HALF else (a.to(b.dtype), b)


def tasks_of(*tensors: Tensor | None) -> int:
    """T: of tensors that have one, or 1 in its place."""
    return max(t.shape[0] for t in tensors if t is not None)


def summed(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x summed over the dimensions that `shape` has not, or has as 1, in float32 where x is half."""
    if tuple(x.shape) == tuple(shape):
        return x
    extra = x.ndim - len(shape)
    over = [i for i in range(x.ndim) if i < extra or (shape[i - extra] == 1 and x.shape[i] != 1)]
    return x.sum(over, keepdim=True, dtype=wide_dtype(x.dtype)).reshape(shape) if over else x.expand(shape)
