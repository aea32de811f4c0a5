"""Functions of single numbers that libdevice has and Triton's interpreter has not."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["log1p"]


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0: what 1 + u lost when it was rounded comes back by the quotient."""
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))
