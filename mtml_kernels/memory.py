"""Memory behind tensors: the engine reads addresses, so every tensor that reaches it must have all of its values there.

Wrapper subclasses, fake and meta tensors, and tensors whose storage was freed or resized have shapes and dtypes like
any other; their address is null, or leads to memory that is not theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGE", "in_memory", "lost"]

LARGE = 1 << 20  # bytes from which memory is recycled: PyTorch's own comes with fresh pages


def in_memory(name: str, t: Tensor, device: str = "cpu") -> Tensor:
    """The tensor, or a contiguous copy of its values, on a type of device whose addresses are read.

    Raises:
        TypeError: there is no memory that holds them.
    """
    why = _absent(t, device)
    if why is not None:
        raise TypeError(
            f"{name}: expected a tensor with memory of its own, got {type(t).__name__} "
            f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}, {why}. Pass plain "
            "dense tensors: what a wrapper holds, .to_dense() of a sparse one; gather a sharded or freed parameter "
            'before the call. mtml.MAML(..., backend="general") runs on whatever PyTorch\'s operations take'
        )
    if t._is_zerotensor():  # zeros that nobody wrote yet
        return t.detach().clone()
    return t if t.is_contiguous() and not t.is_neg() else t.detach().resolve_neg().contiguous()


def _absent(t: Tensor, device: str) -> str | None:
    """What lies behind a tensor instead of its values, in words, or None where they are there."""
    if t.is_nested:
        return "which is nested"
    if t.layout is not torch.strided:
        return f"whose layout is {t.layout}"
    if t.device.type != device:
        return "which the CPU engine cannot read" if device == "cpu" else f"which does not lie on {device!r}"
    if t.numel() == 0 or t._is_zerotensor():
        return None
    try:
        start = t.untyped_storage().data_ptr()
    except RuntimeError:  # NotImplementedError among them
        return "which stands for other tensors"
    if start == 0 and t.untyped_storage().nbytes():
        return "which has no values in memory"
    return lost(t)


def lost(t: Tensor) -> str | None:
    """How much of a dense tensor its storage holds, in words, where that is not all: PyTorch itself would read on."""
    try:
        held = t.untyped_storage().nbytes()
    except RuntimeError:  # it stands for other tensors
        return None
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + last + 1) * t.itemsize if t.numel() else 0
    return None if held >= needed else f"whose storage holds {held} of {needed} bytes"
