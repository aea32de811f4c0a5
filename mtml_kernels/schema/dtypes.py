"""The dtypes that the compiled engine computes in, with their codes in its C interface (csrc/include/mtml/abi.h)."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "FLOATING", "cpu_supports", "floating_supports"]

DTYPES = {torch.float32: 0, torch.float64: 1}
FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def cpu_supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled engine cannot take such tensors, or None."""
    if device_type != "cpu":
        return f"it runs on the CPU, the tensors are on {device_type!r}"
    return None if dtype in DTYPES else f"it computes in float32 and float64, not {dtype}"


def floating_supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why PyTorch's kernels cannot take such tensors, or None."""
    return None if dtype in FLOATING else f"it computes in floating point, not {dtype}"
