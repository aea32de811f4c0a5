"""Arithmetic that rounds as PyTorch's does: by default Triton's float32 roots and quotients are approximate."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quotient", "root"]


@triton.jit
def root(x):
    """sqrt(x), rounded to nearest; of denormal numbers too, which the approximate one takes for 0."""
    y = tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
    return y


@triton.jit
def quotient(x, y):
    """x / y, rounded to nearest."""
    z = x / y if x.dtype == tl.float64 else tl.div_rn(x, y)
    return z
