"""The pointwise functions of a layer program in a tile: y = f(x), its slope f' and its bend f''.

`ref` is y for relu, tanh and sigmoid, else x (schedule.kernels.FROM_OUTPUT). KIND is a program.activations.Act, C0 and
C1 are the node's constants. Where x is not a number, neither is y, as in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.program.activations import Act
from mtml_kernels.triton.pointwise import expm1, log1p, sigmoid, tanh

__all__ = ["affine", "bend", "number", "pulled", "slope", "value"]

RELU = tl.constexpr(int(Act.RELU))
LEAKY_RELU = tl.constexpr(int(Act.LEAKY_RELU))
TANH = tl.constexpr(int(Act.TANH))
SIGMOID = tl.constexpr(int(Act.SIGMOID))
GELU = tl.constexpr(int(Act.GELU))
GELU_TANH = tl.constexpr(int(Act.GELU_TANH))
SILU = tl.constexpr(int(Act.SILU))
SOFTPLUS = tl.constexpr(int(Act.SOFTPLUS))
SIN = tl.constexpr(int(Act.SIN))
COS = tl.constexpr(int(Act.COS))
RSQRT = tl.constexpr(int(Act.RSQRT))
ELU = tl.constexpr(int(Act.ELU))
HALF_SQRT = tl.constexpr(0.7071067811865476)  # 1 / sqrt 2
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
K = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def number(NUMBER: tl.constexpr, x):
    """A constant in the type of x: a literal in a product with float64 would have float32's digits."""
    return tl.full([], NUMBER, x.dtype)


@triton.jit
def value(x, KIND: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """f(x)"""
    c0 = number(C0, x)
    if KIND == RELU:
        y = tl.where(x < 0.0, 0.0, x)
    elif KIND == LEAKY_RELU:
        y = tl.where(x > 0.0, x, x * c0)
    elif KIND == TANH:
        y = tanh(x)
    elif KIND == SIGMOID:
        y = sigmoid(x)
    elif KIND == GELU:
        y = x * _normal(x)
    elif KIND == GELU_TANH:
        y = 0.5 * x * (1.0 + _inner_tanh(x))
    elif KIND == SILU:
        y = x * sigmoid(x)
    elif KIND == SOFTPLUS:
        z = x * c0
        y = tl.where(z > number(C1, x), x, log1p(tl.exp(tl.minimum(z, number(C1, x)))) / c0)
        y = tl.where(x != x, x, y)
    elif KIND == SIN:
        y = tl.sin(c0 * x)
    elif KIND == COS:
        y = tl.cos(c0 * x)
    elif KIND == RSQRT:
        y = 1.0 / tl.sqrt(x + c0)
    else:
        y = tl.where(x > 0.0, x, c0 * expm1(tl.where(x > 0.0, 0.0, x)))
    return y


@triton.jit
def slope(ref, KIND: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """f'"""
    c0 = number(C0, ref)
    if KIND == RELU:
        s = tl.where(ref <= 0.0, 0.0, 1.0).to(ref.dtype)
    elif KIND == LEAKY_RELU:
        s = tl.where(ref > 0.0, 1.0, c0)
    elif KIND == TANH:
        s = 1.0 - ref * ref
    elif KIND == SIGMOID:
        s = ref * (1.0 - ref)
    elif KIND == GELU:
        s = _normal(ref) + ref * number(DENSITY, ref) * tl.exp(-0.5 * ref * ref)
    elif KIND == GELU_TANH:
        t = _inner_tanh(ref)
        s = 0.5 * (1.0 + t) + 0.5 * ref * (1.0 - t * t) * _inner_slope(ref)
    elif KIND == SILU:
        q = sigmoid(ref)
        s = q * (1.0 + ref * (1.0 - q))
    elif KIND == SOFTPLUS:
        s = tl.where(ref * c0 > number(C1, ref), 1.0, sigmoid(ref * c0))
    elif KIND == SIN:
        s = tl.cos(c0 * ref) * c0
    elif KIND == COS:
        s = -tl.sin(c0 * ref) * c0
    elif KIND == RSQRT:
        r = 1.0 / tl.sqrt(ref + c0)
        s = -0.5 * (r * r * r)
    else:
        s = tl.where(ref > 0.0, 1.0, c0 * tl.exp(tl.where(ref > 0.0, 0.0, ref)))
    return s


@triton.jit
def pulled(d, ref, KIND: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """d f', and 0 where relu is off, whatever d is."""
    return tl.where(ref <= 0.0, 0.0, d) if KIND == RELU else d * slope(ref, KIND, C0, C1)


@triton.jit
def affine(x, C0: tl.constexpr, C1: tl.constexpr):
    """c0 x + c1"""
    return x * number(C0, x) + number(C1, x)


@triton.jit
def bend(ref, KIND: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """f'' , of what has one"""
    c0 = number(C0, ref)
    if KIND == TANH:
        b = 2.0 * ref * (ref * ref - 1.0)
    elif KIND == SIGMOID:
        b = ref * (1.0 - ref) * (1.0 - 2.0 * ref)
    elif KIND == GELU:
        b = number(DENSITY, ref) * tl.exp(-0.5 * ref * ref) * (2.0 - ref * ref)
    elif KIND == GELU_TANH:
        t, u = _inner_tanh(ref), _inner_slope(ref)
        b = (1.0 - t * t) * (u + 0.5 * ref * (6.0 * number(K, ref) * number(CUBIC, ref) * ref - 2.0 * t * u * u))
    elif KIND == SILU:
        q = sigmoid(ref)
        b = q * (1.0 - q) * (2.0 + ref * (1.0 - 2.0 * q))
    elif KIND == SOFTPLUS:
        q = sigmoid(ref * c0)
        b = tl.where(ref * c0 > number(C1, ref), 0.0, c0 * q * (1.0 - q))
    elif KIND == SIN:
        b = -tl.sin(c0 * ref) * c0 * c0
    elif KIND == COS:
        b = -tl.cos(c0 * ref) * c0 * c0
    elif KIND == RSQRT:
        r = 1.0 / tl.sqrt(ref + c0)
        b = 0.75 * (r * r * r * r * r)
    else:
        b = tl.where(ref >= 0.0, 0.0, c0 * tl.exp(tl.where(ref >= 0.0, 0.0, ref)))
    return b


@triton.jit
def _normal(x):
    """The normal distribution up to x."""
    return 0.5 * (1.0 + tl.erf(x * number(HALF_SQRT, x)))


@triton.jit
def _inner_tanh(x):
    """tanh(k (x + c x^3))"""
    return tanh(number(K, x) * x * (1.0 + number(CUBIC, x) * x * x))


@triton.jit
def _inner_slope(x):
    """The slope of k (x + c x^3)."""
    return number(K, x) * (1.0 + 3.0 * number(CUBIC, x) * x * x)
