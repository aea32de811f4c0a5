"""Memory behind tensors: the engine reads addresses, so every tensor that reaches it must have all of its values there.

Wrapper subclasses, fake and meta tensors, and tensors whose storage was freed or resized have shapes and dtypes like
any other; their address is null, or leads to memory that is not theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.checks import shown

__all__ = ["in_memory"]


def in_memory(name: str, t: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of its values.

    Raises:
        TypeError: there is no memory that holds them.
    """
    why = _absent(t)
    if why is not None:
        raise TypeError(
            f"{name}: expected a tensor with memory of its own, got {type(t).__name__} {shown(t)}, {why}. Pass plain "
            "dense tensors: what a wrapper holds, .to_dense() of a sparse one; gather a sharded or freed parameter "
            'before the call. mtml.MAML(..., backend="general") runs on whatever PyTorch\'s operations take'
        )
    if t._is_zerotensor():  # zeros that nobody wrote yet
        return t.detach().clone()
    return t if t.is_contiguous() and not t.is_neg() else t.detach().resolve_neg().contiguous()


def _absent(t: Tensor) -> str | None:
    """What lies behind a tensor instead of its values, in words, or None where they are there."""
    if t.is_nested:
        return "which is nested"
    if t.layout is not torch.strided:
        return f"whose layout is {t.layout}"
    if t.device.type != "cpu":
        return "which the CPU engine cannot read"
    if t.numel() == 0 or t._is_zerotensor():
        return None
    try:
        storage = t.untyped_storage()
        start, held = storage.data_ptr(), storage.nbytes()
    except RuntimeError:  # NotImplementedError among them
        return "which stands for other tensors"
    if start == 0 and held:
        return "which has no values in memory"
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + last + 1) * t.itemsize
    return None if held >= needed else f"whose storage holds {held} of {needed} bytes"
