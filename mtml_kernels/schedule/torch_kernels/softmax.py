"""Softmax and its logarithm over features.

softmax       dx = y (d - <d, y>)           log_softmax   dx = d - exp(y) sum d
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.program.layers.softmax import Softmax
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, alike, like, wide

__all__ = ["SOFTMAX"]

_aten = torch.ops.aten


def _forward(part: Part, x: Tensor) -> Results:
    return (x.softmax(-1) if part.constants == Softmax.SOFTMAX else x.log_softmax(-1),)


def _backward(part: Part, d: Tensor, y: Tensor) -> Results:
    back = _aten._softmax_backward_data if part.constants == Softmax.SOFTMAX else _aten._log_softmax_backward_data
    d, y = _of_one_shape(d, y)
    return (back(d, y, -1, d.dtype),)


def _of_one_shape(d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if d.shape != y.shape:
        d, y = torch.broadcast_tensors(d, y)
    return alike(d, y)


def _tangent(part: Part, xt: Tensor, y: Tensor) -> Results:
    if part.constants == Softmax.SOFTMAX:  # its Jacobian is symmetric
        return _backward(part, xt, y)
    moved = wide(xt)
    return (like(moved - (wide(y).exp() * moved).sum(-1, keepdim=True), xt),)


def _back_tangent(part: Part, d: Tensor | None, dt: Tensor | None, y: Tensor, yt: Tensor | None) -> Results:
    straight = None if dt is None else _backward(part, dt, y)[0]
    if d is None or yt is None:
        return (straight,)
    d, bent = wide(d), wide(yt)
    if part.constants == Softmax.SOFTMAX:
        bent = bent * (d - (d * y).sum(-1, keepdim=True)) - y * (d * bent).sum(-1, keepdim=True)
    else:
        bent = wide(y).exp() * bent * -d.sum(-1, keepdim=True)
    return (like(bent if straight is None else bent + straight, y),)


SOFTMAX: dict[str, TorchKernel] = {
    "softmax.forward": _forward,
    "softmax.backward": _backward,
    "softmax.tangent": _tangent,
    "softmax.back_tangent": _back_tangent,
}
