"""Poolings, and means over dimensions of a sample, which are poolings of all its points."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import Node, Shape
from mtml_kernels.program.layers.window import WINDOW_CONSTANTS, Axis, Window, constants, image_of, planes, rows, sizes
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op, OpInfo, operation
from mtml_kernels.program.values import Value, dimension
from mtml_kernels.program.vocabulary import Handler, function, layer_of

__all__ = ["Pool", "pool"]


class Pool(enum.IntEnum):
    """How a window becomes a point."""

    MAX = 0  # padded with -inf
    AVG = 1  # divisor 0: the window with its padding, -1: the points inside the image, > 0: that number
    ADAPTIVE_AVG = 2  # window i of n: floor(i * H / n) .. ceil((i + 1) * H / n); kernel, stride and padding are unused


def pool(kind: int, x: Tensor, numbers: Sequence[float]) -> Tensor:
    """[N, H*W, C] -> [N, OH*OW, C]."""
    window = Window.of(numbers)
    image = planes(x, window.size)
    if kind == Pool.ADAPTIVE_AVG:
        return rows(F.adaptive_avg_pool2d(image, window.out))
    if kind == Pool.MAX:
        padded = window.padded(image, -torch.inf)
        return rows(F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation))
    sums = F.avg_pool2d(window.padded(image, 0.0), window.kernel, window.stride, divisor_override=1)
    if window.last > 0:
        return rows(sums / window.last)
    height, width = (torch.tensor(window.counts(axis), dtype=x.dtype, device=x.device) for axis in (0, 1))
    return rows(sums / (height[:, None] * width))


operation(
    OpInfo(
        Op.POOL,
        "pool",
        lambda g: pool(g.kind, g.operands[0], g.constants),
        constants=WINDOW_CONSTANTS,
        label=lambda kind, constants: f"{Pool(kind).name.lower()}_pool",
    )
)


def _build(b: Builder, x: Value, kind: Pool, space: Shape, axes: Sequence[Axis], divisor: float = 0) -> Value:
    node = Node(Op.POOL, a=b.image(x), b=int(kind), rows=math.prod(space), features=x.shape[0])
    draft = Draft(node, constants=constants(axes, divisor))
    return b.value(b.emit(draft), (x.shape[0], *space), 1, image=True)


def _axes(x: Value, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> tuple[list[Axis], Shape]:
    dims = len(x.shape) - 1
    kernels = sizes(kernel, dims, "kernel")
    strides = kernels if stride is None or stride == [] else sizes(stride, dims, "stride")
    pads, dilations = sizes(padding, dims, "padding"), sizes(dilation, dims, "dilation")
    if any(2 * pad > size for pad, size in zip(pads, kernels, strict=True)):
        raise Cannot("its padding is more than half of its kernel")
    axes = [
        _axis(*axis, ceil_mode=ceil_mode) for axis in zip(x.shape[1:], kernels, strides, pads, dilations, strict=True)
    ]
    space = tuple(axis.out for axis in axes)
    if min(space) < 1:
        raise Cannot(f"its window is larger than its input {x}")
    return axes, space


def _axis(size: int, kernel: int, stride: int, pad: int, dilation: int, *, ceil_mode: bool) -> Axis:
    """As PyTorch counts; with ceil_mode the last window must still begin inside the image or the padding before it."""
    span = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1
    return Axis(size, out, kernel, stride, pad, dilation)


def _max_pool(dims: int) -> Handler:
    def call(
        b: Builder, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        x = image_of(input, dims)
        if return_indices:
            raise Cannot("max pooling with return_indices=True is not fused")
        axes, space = _axes(x, kernel_size, stride, padding, dilation, ceil_mode)
        return _build(b, x, Pool.MAX, space, axes)

    return call


def _avg_pool(dims: int) -> Handler:
    def call(
        b: Builder, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        x = image_of(input, dims)
        axes, space = _axes(x, kernel_size, stride, padding, 1, ceil_mode)
        return _build(b, x, Pool.AVG, space, axes, divisor_override or (0 if count_include_pad else -1))

    return call


def _adaptive_avg_pool(dims: int) -> Handler:
    def call(b: Builder, input: Any, output_size: Any) -> Any:
        x = image_of(input, dims)
        wanted = [output_size] * dims if output_size is None or isinstance(output_size, int) else list(output_size)
        wanted = [size if want is None else want for want, size in zip(wanted, x.shape[1:], strict=False)]
        return _adaptive(b, x, tuple(sizes(wanted, dims, "output size")))

    return call


def _adaptive(b: Builder, x: Value, space: Shape) -> Value:
    axes = [Axis(size, out) for size, out in zip(x.shape[1:], space, strict=True)]
    return _build(b, x, Pool.ADAPTIVE_AVG, space, axes)


def _register() -> None:
    max_options = "kernel_size stride padding dilation ceil_mode return_indices"
    avg_options = "kernel_size stride padding ceil_mode count_include_pad"
    maximum, average, adaptive = _max_pool(1), _avg_pool(1), _adaptive_avg_pool(1)
    function(F.max_pool1d, torch.max_pool1d)(maximum)
    layer_of(maximum, max_options, nn.MaxPool1d)
    function(F.avg_pool1d)(average)
    layer_of(average, avg_options, nn.AvgPool1d)
    function(F.adaptive_avg_pool1d)(adaptive)
    layer_of(adaptive, "output_size", nn.AdaptiveAvgPool1d)
    maximum, average, adaptive = _max_pool(2), _avg_pool(2), _adaptive_avg_pool(2)
    function(F.max_pool2d, torch.max_pool2d)(maximum)
    layer_of(maximum, max_options, nn.MaxPool2d)
    function(F.avg_pool2d)(average)
    layer_of(average, f"{avg_options} divisor_override", nn.AvgPool2d)
    function(F.adaptive_avg_pool2d)(adaptive)
    layer_of(adaptive, "output_size", nn.AdaptiveAvgPool2d)


_register()


@function(F.max_pool1d_with_indices, F.max_pool2d_with_indices)
def _with_indices(b: Builder, input: Any, *args: Any, **kwargs: Any) -> Any:
    raise Cannot("max pooling with return_indices=True is not fused")


@function(methods="mean")
def _mean(b: Builder, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over dimensions of each sample that lie side by side, at the front or at the end."""
    x = input
    if not isinstance(x, Value) or not x.batched or dtype is not None:
        raise Cannot("only the mean of a sample's own values is fused")
    over = sorted({dimension(x, d) for d in ([dim] if isinstance(dim, int) else dim or [])})
    if not over or over[0] == 0 or x.lead > 1:
        raise Cannot("it reduces over the samples of the batch")
    first, last, count = over[0] - 1, over[-1] - 1, len(x.shape)
    if x.image and first > 0 and count <= 3:  # any dimensions of space
        pooled = _adaptive(b, x, tuple(1 if i in over else size for i, size in enumerate(x.shape[1:], 2)))
    elif last - first >= len(over) or (first > 0 and last < count - 1):
        raise Cannot("the mean over dimensions that are neither the first nor the last of a sample is not fused")
    elif last == count - 1:  # [kept, reduced]
        kept = math.prod(x.shape[:first])
        pooled = _adaptive(b, b.reshape(x, 1, (kept, x.elements // kept)), (1,))
    else:  # [reduced, kept]
        reduced = math.prod(x.shape[: last + 1])
        turned = b.rotate(b.reshape(x, 1, (reduced, x.elements // reduced)), 1)
        pooled = _adaptive(b, turned, (1,))
    shape = [1 if i in over else size for i, size in enumerate(x.shape, 1)]
    return b.reshape(pooled, 1, tuple(shape if keepdim else [s for i, s in enumerate(shape, 1) if i not in over]))
