"""Poolings of images [T, N, H W, C]. Of a maximum the index is PyTorch's: the position in the image, int64.

The gradient of a point is gathered from the windows that hold it, so that nothing is added to memory by two programs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.program.layers.window import Window
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Pooling
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, strides, type_of
from mtml_kernels.triton.inner_loop.pool_kernels import gather_kernel, pool_back_kernel, pool_kernel

__all__ = ["POOL", "Reach", "image_tile"]


def image_tile(elements: int) -> int:
    """The launch policy: how many elements of a sample's result a program takes.

    512, 4 for each of 128 threads, which then walk over their windows: neighbours are channels, one load of 16 bytes.
    A support set of 5 images of 14 x 14 points and 64 channels makes 125 programs. Of one task's shape alone. Reasoned,
    not yet measured.
    """
    return power(elements, 512)


class Reach(NamedTuple):
    """A pooling as its kernels have it: the numbers of `Window` by name, and how far the loops go.

    Points of a window, and windows over a point, along height and width: at most so many.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    last: int
    windows: tuple[int, int]

    @staticmethod
    def of(given: Pooling) -> Reach:
        """Of a node's constants."""
        own = Window.of(given.window)
        if given.kind == Pool.ADAPTIVE_AVG:
            axes = [_adaptive(size, out) for size, out in zip(own.size, own.out, strict=True)]
            own = own._replace(kernel=(axes[0][0], axes[1][0]), dilation=(1, 1), pad=(0, 0), stride=(1, 1))
            windows = axes[0][1], axes[1][1]
        else:
            reach = [own.dilation[i] * (own.kernel[i] - 1) + 1 for i in (0, 1)]
            windows = math.ceil(reach[0] / own.stride[0]), math.ceil(reach[1] / own.stride[1])
        return Reach(*own.size, *own.out, own.kernel, own.stride, own.pad, own.dilation, own.last, windows)

    def constants(self) -> list[int]:
        """In the order of the kernels' parameters."""
        pairs = (self.kernel, self.stride, self.pad, self.dilation)
        return [*self[:4], *(n for pair in pairs for n in pair), self.last, *self.windows]


def _adaptive(size: int, out: int) -> tuple[int, int]:
    """The most points of a window i, floor(i size / out) .. ceil((i + 1) size / out), and windows over a point."""
    spans = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    points = [sum(first <= p < end for first, end in spans) for p in range(size)]
    return max(end - first for first, end in spans), max(points)


def _forward(part: Part, x: Tensor) -> Results:
    given: Pooling = part.constants
    reach = Reach.of(given)
    tasks, samples, _, channels = x.shape
    shape = tasks, samples, reach.out_height * reach.out_width, channels
    y = new(shape, x, x.dtype)
    index = new(shape, x, torch.int64) if given.kind == Pool.MAX and part.wants[1] else None
    if y.numel():
        elements = shape[2] * channels
        block = image_tile(elements)
        with on(x.device):
            pool_kernel[(tasks * samples, -(-elements // block))](
                x, y, y if index is None else index, samples, *x.stride(), given.kind, channels, *reach.constants(),
                index is not None, block, type_of(x), **OPTIONS,
            )  # fmt: skip
    return y, index


def _tangent(part: Part, xt: Tensor, index: Tensor | None) -> Results:
    if index is None:
        return (_forward(part, xt)[0],)
    tasks = max(xt.shape[0], index.shape[0])
    yt = new((tasks, *index.shape[1:]), xt, xt.dtype)
    if yt.numel():
        moved, at = xt.expand(tasks, -1, -1, -1), index.expand(tasks, -1, -1, -1)
        _, samples, rows, channels = yt.shape
        block = image_tile(rows * channels)
        with on(xt.device):
            gather_kernel[(tasks * samples, -(-rows * channels // block))](
                moved, at, yt, samples, rows * channels, *moved.stride(), *at.stride(), channels, block, **OPTIONS
            )
    return (yt,)


def _backward(part: Part, d: Tensor, index: Tensor | None) -> Results:
    given: Pooling = part.constants
    reach = Reach.of(given)
    tasks = max(t.shape[0] for t in (d, index) if t is not None)
    samples, channels = d.shape[1], d.shape[3]
    points = reach.height * reach.width
    dx = new((tasks, samples, points, channels), d, d.dtype)
    if dx.numel():
        block = image_tile(points * channels)
        own, at = (None if t is None else t.expand(tasks, -1, -1, -1) for t in (d, index))
        with on(d.device):
            pool_back_kernel[(tasks * samples, -(-points * channels // block))](
                own, own if at is None else at, dx, samples, *strides(own, 4), *strides(at, 4), given.kind, channels,
                *reach.constants(), block, type_of(d), **OPTIONS,
            )  # fmt: skip
    return (dx,)


POOL: dict[str, Any] = {
    "pool.forward": _forward,
    "pool.backward": _backward,
    "pool.tangent": _tangent,
}
