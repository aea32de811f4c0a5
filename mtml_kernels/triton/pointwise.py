"""Functions of single numbers that libdevice has and Triton's interpreter has not."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expm1", "log1p", "sigmoid", "tanh"]


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0: what 1 + u lost when it was rounded comes back by the quotient."""
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1: what u = exp(x) lost when it was rounded comes back by the quotient."""
    u = tl.exp(x)
    v = u - 1.0
    safe = tl.where((v == 0.0) | (v == -1.0) | (u == float("inf")), 2.0, u)
    return tl.where(v == 0.0, x, tl.where((v == -1.0) | (u == float("inf")), v, v * (x / tl.log(safe))))


@triton.jit
def tanh(x):
    """By exp(-2 |x|) - 1, which neither overflows nor loses what is near 0."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + tl.exp(-x))
