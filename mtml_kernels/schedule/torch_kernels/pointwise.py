"""Activations by the formulas of csrc/include/mtml/pointwise.h, with PyTorch's own kernel of d f' wherever it has one.

    backward  dx = d f'        back_tangent  dxt = dt f' + p f''  with p = d xt

`ref` is y for `kernels.FROM_OUTPUT`, else x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mtml_kernels.program.activations import Act
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import BENT
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, like, wide

__all__ = ["ACTIVATIONS"]

Slope = Callable[[Tensor, Tensor, float, float], Tensor]  # (d, ref, c0, c1) -> d f'
Bend = Callable[[Tensor, float, float], Tensor]  # (ref, c0, c1) -> f''

_aten = torch.ops.aten

_SLOPES: dict[Act, Slope] = {
    Act.RELU: lambda d, y, c0, c1: _aten.threshold_backward(d, y, 0),
    Act.LEAKY_RELU: lambda d, x, c0, c1: _aten.leaky_relu_backward(d, x, c0, False),
    Act.TANH: lambda d, y, c0, c1: _aten.tanh_backward(d, y),
    Act.SIGMOID: lambda d, y, c0, c1: _aten.sigmoid_backward(d, y),
    Act.GELU: lambda d, x, c0, c1: _aten.gelu_backward(d, x),
    Act.GELU_TANH: lambda d, x, c0, c1: _aten.gelu_backward(d, x, approximate="tanh"),
    Act.SILU: lambda d, x, c0, c1: _aten.silu_backward(d, x),
    Act.SOFTPLUS: lambda d, x, c0, c1: _aten.softplus_backward(d, x, c0, c1),
    Act.SIN: lambda d, x, c0, c1: d * _scaled(_scaled(x, c0).cos(), c0),
    Act.COS: lambda d, x, c0, c1: d * _scaled(_scaled(x, c0).sin(), -c0),
    Act.RSQRT: lambda d, x, c0, c1: d * (x + c0).rsqrt_().pow_(3).mul_(-0.5),
    Act.ELU: lambda d, x, c0, c1: _aten.elu_backward(d, c0, 1, 1, False, x),
}


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _gelu_bend(x: Tensor, c0: float, c1: float) -> Tensor:
    square = x * x
    return (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)) * (2 - square)


def _gelu_tanh_bend(x: Tensor, c0: float, c1: float) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(k * x * (1 + c * square))
    u1, u2 = k * (1 + 3 * c * square), 6 * k * c * x
    return (1 - t * t) * (u1 + 0.5 * x * (u2 - 2 * t * u1 * u1))


def _silu_bend(x: Tensor, c0: float, c1: float) -> Tensor:
    s = torch.sigmoid(x)
    q = 1 - s
    return s * q * (2 + x * (q - s))


def _softplus_bend(x: Tensor, c0: float, c1: float) -> Tensor:
    scaled = x * c0
    s = torch.sigmoid(scaled)
    return torch.where(scaled > c1, 0.0, c0 * s * (1 - s))


def _elu_bend(x: Tensor, c0: float, c1: float) -> Tensor:
    return torch.where(x >= 0, 0.0, c0 * x.exp())


_BENDS: dict[Act, Bend] = {
    Act.TANH: lambda y, c0, c1: 2 * y * (y * y - 1),
    Act.SIGMOID: lambda y, c0, c1: y * (1 - y) * (1 - 2 * y),
    Act.GELU: _gelu_bend,
    Act.GELU_TANH: _gelu_tanh_bend,
    Act.SILU: _silu_bend,
    Act.SOFTPLUS: _softplus_bend,
    Act.SIN: lambda x, c0, c1: _scaled(x, c0).sin().mul_(-c0 * c0),
    Act.COS: lambda x, c0, c1: _scaled(x, c0).cos().mul_(-c0 * c0),
    Act.RSQRT: lambda x, c0, c1: (x + c0).rsqrt_().pow_(5).mul_(0.75),
    Act.ELU: _elu_bend,
}


def _forward(part: Part, x: Tensor) -> Results:
    kind, c0, c1 = part.constants
    return (Act(kind).info.formula(x, c0, c1),)


def _backward(part: Part, d: Tensor, ref: Tensor) -> Results:
    kind, c0, c1 = part.constants
    return (_SLOPES[kind](d, ref, c0, c1),)


def _back_tangent(part: Part, d: Tensor | None, dt: Tensor | None, ref: Tensor, xt: Tensor | None) -> Results:
    kind, c0, c1 = part.constants
    if d is None or xt is None or kind not in BENT:
        return (None if dt is None else _SLOPES[kind](dt, ref, c0, c1),)
    moved, wide_ref = wide(d) * xt, wide(ref)
    if dt is None:
        return (like(_BENDS[kind](wide_ref, c0, c1).mul(moved), d),)
    dt = wide(dt)
    if kind == Act.TANH:  # f'' = -2 y f'
        return (like(_aten.tanh_backward(torch.addcmul(dt, moved, wide_ref, value=-2), wide_ref), d),)
    if kind == Act.SIGMOID:  # f'' = (1 - 2 y) f'
        inner = torch.addcmul(dt + moved, moved, wide_ref, value=-2)
        return (like(_aten.sigmoid_backward(inner, wide_ref), d),)
    straight = _SLOPES[kind](dt, wide_ref, c0, c1)
    return (like(torch.addcmul(straight, moved, _BENDS[kind](wide_ref, c0, c1)), d),)


ACTIVATIONS: dict[str, TorchKernel] = {
    "act.forward": _forward,
    "act.backward": _backward,
    "act.tangent": _backward,  # f' is symmetric
    "act.back_tangent": _back_tangent,
}
