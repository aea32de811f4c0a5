"""Poolings. Of a maximum the index is that of PyTorch: the position in the image, for every point of the result."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Pooling
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel
from mtml_kernels.schedule.torch_kernels.images import Geometry, batch, geometry, plane

__all__ = ["POOL"]

_aten = torch.ops.aten


def _forward(part: Part, x: Tensor) -> Results:
    given: Pooling = part.constants
    if given.kind != Pool.MAX:
        return _average(given, x), None
    form = geometry(given.window)
    tasks, window, beside = x.shape[0], form.window, _beside(x)
    image = batch(x, window.size, beside)
    y, index = _aten.max_pool2d_with_indices(
        image, window.kernel, window.stride, form.padding, window.dilation, form.ceil
    )  # fmt: skip
    return plane(y, tasks, beside), plane(index, tasks, beside) if part.wants[1] else None


def _tangent(part: Part, xt: Tensor, index: Tensor | None) -> Results:
    if index is None:
        return (_average(part.constants, xt),)
    xt, index = _same_tasks(xt, index)
    return (xt.gather(2, index),)


def _backward(part: Part, d: Tensor, index: Tensor | None) -> Results:
    given: Pooling = part.constants
    form = geometry(given.window)
    if index is None:
        return (_average_back(given, form, d),)
    d, index = _same_tasks(d, index)
    beside, window = _beside(d), form.window
    grad, taken = batch(d, window.out, beside), batch(index, window.out, beside)
    image = grad.new_empty(()).expand(*grad.shape[:2], *window.size)
    dx = _aten.max_pool2d_with_indices_backward(
        grad, image, window.kernel, window.stride, form.padding, window.dilation, form.ceil, taken
    )
    return (plane(dx, d.shape[0], beside),)


POOL: dict[str, TorchKernel] = {
    "pool.forward": _forward,
    "pool.backward": _backward,
    "pool.tangent": _tangent,
}


def _beside(x: Tensor) -> bool:
    """Whether all tasks' channels lie beside each other, as a convolution with weights of each task leaves them."""
    return x.stride(0) < x.stride(1)


def _same_tasks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    tasks = max(a.shape[0], b.shape[0])
    a, b = (t if t.shape[0] == tasks else t.expand(tasks, -1, -1, -1) for t in (a, b))
    return a, b


def _whole(form: Geometry) -> bool:
    return form.window.out == (1, 1)


def _divisor(form: Geometry) -> tuple[bool, int | None]:
    """(count_include_pad, divisor_override) of PyTorch."""
    return form.window.last == 0, form.window.last if form.window.last > 0 else None


def _average(given: Pooling, x: Tensor) -> Tensor:
    form = geometry(given.window)
    if given.kind == Pool.ADAPTIVE_AVG and _whole(form):
        return x.mean(2, keepdim=True)
    tasks, window, beside = x.shape[0], form.window, _beside(x)
    image = batch(x, window.size, beside)
    if given.kind == Pool.ADAPTIVE_AVG:
        return plane(_aten._adaptive_avg_pool2d(image, window.out), tasks, beside)
    y = _aten.avg_pool2d(image, window.kernel, window.stride, form.padding, form.ceil, *_divisor(form))
    return plane(y, tasks, beside)


def _average_back(given: Pooling, form: Geometry, d: Tensor) -> Tensor:
    tasks, window = d.shape[0], form.window
    if given.kind == Pool.ADAPTIVE_AVG and _whole(form):
        points = window.size[0] * window.size[1]
        return (d / points).expand(-1, -1, points, -1)
    beside = _beside(d)
    grad = batch(d, window.out, beside)
    image = grad.new_empty(()).expand(*grad.shape[:2], *window.size)
    if given.kind == Pool.ADAPTIVE_AVG:
        return plane(_aten._adaptive_avg_pool2d_backward(grad, image), tasks, beside)
    dx = _aten.avg_pool2d_backward(
        grad, image, window.kernel, window.stride, form.padding, form.ceil, *_divisor(form)
    )  # fmt: skip
    return plane(dx, tasks, beside)
