"""Poolings of images [T, N, H W, C] as jobs. Of a maximum the index is the position in the image, as PyTorch has it.

A pooling reads its operand elsewhere than at its own tile, so that it begins a job, behind which pointwise parts go on.
The gradient of a point is gathered from the windows that hold it: nothing is added to memory by two programs. Where
windows lie side by side, `Panes`, a pooling also ends the job of what it pools: a program has all points of a window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.program.layers.window import Window
from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.schedule.kernels import Pooling

__all__ = ["POOLS", "Panes", "Reach", "index_of", "index_type"]

POOLS = frozenset({"pool.forward", "pool.backward", "pool.tangent"})


def index_of(part: Part) -> int:
    """The plane of a maximum's positions, which `pool.forward` writes and the others read."""
    if part.kernel not in POOLS:
        return ABSENT
    return part.writes[1] if part.kernel == "pool.forward" else part.reads[1]


def index_type(given: Pooling) -> torch.dtype:
    """Of positions in the image: a plane of 64 bits would be half as large as the image."""
    height, width = Window.of(given.window).size
    return torch.int16 if height * width <= 2**15 else torch.int32


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


class Panes(NamedTuple):
    """Windows side by side: `grid` of them cover an image of `size`, `out` of them lie in it whole and are pooled."""

    kernel: tuple[int, int]
    size: tuple[int, int]
    out: tuple[int, int]
    grid: tuple[int, int]

    @staticmethod
    def of(given: Pooling) -> Panes | None:
        """None where windows overlap, have gaps, or reach beyond the image."""
        w = Window.of(given.window)
        apart = w.kernel == w.stride and w.pad == (0, 0) and w.dilation == (1, 1)
        inside = all(n * k <= size for n, k, size in zip(w.out, w.kernel, w.size, strict=True))
        if given.kind == Pool.ADAPTIVE_AVG or not (apart and inside):
            return None
        grid = -(-w.size[0] // w.kernel[0]), -(-w.size[1] // w.kernel[1])
        return Panes(w.kernel, w.size, w.out, grid)
