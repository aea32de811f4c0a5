"""Convolutions: one of PyTorch's for all tasks, with a group of channels for each task where each has its own weights.

    forward   y = x * w + b     backward  dx = d *' w,  dw = d *'' x,  db = sum d     tangents: the product rule

on images [T N, C, H, W] with shared weights [O, C / g, kh, kw], else on [N, T C, H, W] with [T O, C / g, kh, kw]; on a
CPU one of PyTorch's for each task instead (`_in_turn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, like, tasks_of, wide
from mtml_kernels.schedule.torch_kernels.images import Geometry, batch, geometry, plane
from mtml_kernels.schedule.torch_kernels.linear import bias_gradient, bias_tangent

__all__ = ["CONV"]

Pair = tuple[Tensor | None, Tensor | None]  # of which an absent one makes the product zero


def _forward(part: Part, x: Tensor, w: Tensor, b: Tensor | None) -> Results:
    return (_convolve(geometry(part.constants.window), x, w, b),)


def _backward(part: Part, d: Tensor, x: Tensor | None, w: Tensor | None) -> Results:
    dx, dw, db = part.wants
    return (
        _input_gradients(part, [(d, w)]) if dx else None,
        _weight_gradients(part, [(d, x)]) if dw else None,
        bias_gradient(d, part.constants.over_tasks) if db else None,
    )


def _tangent(
    part: Part, x: Tensor | None, xt: Tensor | None, w: Tensor | None, wt: Tensor | None, bt: Tensor | None
) -> Results:
    form = geometry(part.constants.window)
    yt: Tensor | None = None
    for value, weight in ((x, wt), (xt, w)):
        if value is not None and weight is not None:
            yt = _convolve(form, value, weight, bt) if yt is None else _plus(yt, _convolve(form, value, weight))
    if yt is None:
        assert bt is not None and x is not None
        return (bias_tangent(bt, x, form.window.out[0] * form.window.out[1]),)
    return (yt,)


def _back_tangent(
    part: Part, d: Tensor | None, dt: Tensor | None, x: Tensor | None, xt: Tensor | None,
    w: Tensor | None, wt: Tensor | None,
) -> Results:  # fmt: skip
    dxt, dwt, dbt = part.wants
    return (
        _input_gradients(part, [(dt, w), (d, wt)]) if dxt else None,
        _weight_gradients(part, [(dt, x), (d, xt)]) if dwt else None,
        bias_gradient(dt, part.constants.over_tasks) if dbt and dt is not None else None,
    )


CONV: dict[str, TorchKernel] = {
    "conv.forward": _forward,
    "conv.backward": _backward,
    "conv.tangent": _tangent,
    "conv.back_tangent": _back_tangent,
}


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in place of a where it has every task."""
    return a.add_(b) if a.shape[0] >= b.shape[0] else b.add_(a)


def _every(x: Tensor, tasks: int) -> Tensor:
    return x if x.shape[0] == tasks else x.expand(tasks, *x.shape[1:])


def _kernels(form: Geometry, w: Tensor) -> Tensor:
    """[T, O, K] as [T O, C / g, kh, kw]."""
    kh, kw = form.window.kernel
    return w.reshape(w.shape[0] * w.shape[1], w.shape[2] // (kh * kw), kh, kw)


def _image(form: Geometry, x: Tensor, own: bool) -> Tensor:
    image = batch(x, form.window.size, own)
    return image if form.around is None else F.pad(image, form.around)


def _in_turn(x: Tensor) -> bool:
    """Whether tasks with weights of their own are convolved one after the other.

    On a CPU PyTorch's grouped convolutions take about twice as long and leave the channels outermost: 32 tasks of 75
    images 14 x 14 x 64, 3 x 3, stride 2, on two cores with AVX2: forward 135 against 62 ms, both gradients 368 against
    171 ms. Elsewhere one launch for all tasks.
    """
    return x.device.type == "cpu"


def _each(tasks: int, of_task: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """What `of_task` makes of every task's operands, [1, ...] each  # [T, ...]"""
    result: Tensor | None = None
    for t in range(tasks):
        own = of_task(*(x if x is None or x.shape[0] == 1 else x[t : t + 1] for x in operands))
        if result is None:
            result = own.new_empty((tasks, *own.shape[1:]))
        result[t] = own[0]
    assert result is not None
    return result


def _convolve(form: Geometry, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """[T, N, H W, C] -> [T, N, OH OW, O]"""
    own, tasks, window = w.shape[0] > 1, tasks_of(x, w), form.window
    if own and _in_turn(x):
        return _each(tasks, lambda x, w, b: _convolve(form, x, w, b), x, w, b)
    inside = b is not None and (own or b.shape[0] == 1)
    bias = like(b, x).expand(w.shape[0], -1, -1).reshape(-1) if b is not None and inside else None
    groups = window.last * w.shape[0]
    image, kernels = _image(form, _every(x, tasks), own), like(_kernels(form, w), x)
    y = plane(F.conv2d(image, kernels, bias, window.stride, form.padding, window.dilation, groups), tasks, own)
    return y if b is None or inside else y + like(b, x).unsqueeze(1)


def _transposed(
    form: Geometry, d: Tensor, image: Tensor, kernels: Tensor, groups: int, of_image: bool
) -> Tensor:  # fmt: skip
    """The gradient of the image, or of the kernels, from d of the result; of the other only the shape is read."""
    window, mask = form.window, [of_image, not of_image, False]
    both = torch.ops.aten.convolution_backward(
        d, image, kernels, None, window.stride, form.padding, window.dilation, False, [0, 0], groups, mask
    )
    result: Tensor = both[0 if of_image else 1]
    return result


def _input_gradients(part: Part, pairs: Iterable[Pair]) -> Tensor | None:
    """The sum over pairs (d, w) of the gradient of the input  # [T, N, H W, C]"""
    form, total = geometry(part.constants.window), None
    for d, w in pairs:
        if d is not None and w is not None:
            dx = _input_gradient(form, d, w)
            total = dx if total is None else _plus(total, dx)
    return total


def _input_gradient(form: Geometry, d: Tensor, w: Tensor) -> Tensor:
    own, tasks, window = w.shape[0] > 1, tasks_of(d, w), form.window
    if own and _in_turn(d):
        return _each(tasks, lambda d, w: _input_gradient(form, d, w), d, w)
    groups, kernels = window.last * w.shape[0], like(_kernels(form, w), d)
    y = batch(_every(d, tasks), window.out, own)
    image = y.new_empty(()).expand(y.shape[0], kernels.shape[1] * groups, *_padded(form))
    dx = _transposed(form, y, image, kernels, groups, True)
    if form.around is not None:
        dx = F.pad(dx, [-side for side in form.around])
    return plane(dx, tasks, own)


def _padded(form: Geometry) -> tuple[int, int]:
    """The size of the image that the convolution gets."""
    (height, width), (left, right, top, bottom) = form.window.size, form.around or (0, 0, 0, 0)
    return height + top + bottom, width + left + right


def _weight_gradients(part: Part, pairs: Iterable[Pair]) -> Tensor | None:
    """The sum over pairs (d, x) of the gradient of the weight  # [T or 1, O, K]"""
    form, total = geometry(part.constants.window), None
    for d, x in pairs:
        if d is not None and x is not None:
            dw = _weight_gradient(form, wide(d), wide(x), part.constants.over_tasks)
            total = dw if total is None else _plus(total, dw)
    return total


def _weight_gradient(form: Geometry, d: Tensor, x: Tensor, over_tasks: bool) -> Tensor:
    tasks, window = tasks_of(d, x), form.window
    own = tasks > 1 and not over_tasks
    if own and _in_turn(d):
        return _each(tasks, lambda d, x: _weight_gradient(form, d, x, over_tasks), d, x)
    sets = tasks if own else 1
    image, y = _image(form, _every(x, tasks), own), batch(_every(d, tasks), window.out, own)
    shape = (y.shape[1], x.shape[3] // window.last, *window.kernel)
    dw = _transposed(form, y, image, y.new_empty(()).expand(shape), window.last * sets, False)
    return dw.reshape(sets, d.shape[3], -1)
