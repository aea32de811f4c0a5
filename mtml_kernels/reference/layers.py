"""Convolution, pooling and normalisation of the layer program, as its encoding defines them.

Images are [N, H*W, C]. The numbers of a window are those of `Op.CONV` and `Op.POOL`: H, W, OH, OW, kh, kw, sh, sw, ph,
pw, dh, dw, and the groups or the divisor. Everything is differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.program import Norm, Pool

__all__ = ["convolve", "normalise", "pool"]

Pair = tuple[int, int]


class Window(NamedTuple):
    """A node's numbers, by height and width."""

    size: Pair
    out: Pair
    kernel: Pair
    stride: Pair
    pad: Pair
    dilation: Pair
    last: int

    @staticmethod
    def of(constants: Sequence[float]) -> Window:
        numbers = [int(c) for c in constants]
        size, out, kernel, stride, pad, dilation = ((numbers[i], numbers[i + 1]) for i in range(0, 12, 2))
        return Window(size, out, kernel, stride, pad, dilation, numbers[12])

    def padded(self, image: Tensor, value: float) -> Tensor:
        """The image [N, C, H, W] with what the windows reach around it; without what they do not reach."""
        return F.pad(image, (*self._around(1), *self._around(0)), value=value)

    def _around(self, axis: int) -> Pair:
        end = (self.out[axis] - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return self.pad[axis], end - self.pad[axis] - self.size[axis]

    def counts(self, axis: int) -> list[int]:
        """How many points of each window along one axis an average counts."""
        size, pad = self.size[axis], self.pad[axis]
        starts = [i * self.stride[axis] - pad for i in range(self.out[axis])]
        if self.last == 0:  # with the padding, but not beyond it
            return [min(start + self.kernel[axis], size + pad) - start for start in starts]
        return [min(start + self.kernel[axis], size) - max(start, 0) for start in starts]


def _planes(x: Tensor, size: Pair) -> Tensor:
    """[N, H*W, C] as [N, C, H, W]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def _rows(image: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H*W, C]."""
    return image.flatten(2).transpose(1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, constants: Sequence[float]) -> Tensor:
    """[N, H*W, C] -> [N, OH*OW, O] for a weight with the elements of [O, C / groups, kh, kw]."""
    window = Window.of(constants)
    kernels = weight.reshape(weight.shape[0], x.shape[2] // window.last, *window.kernel)
    image = window.padded(_planes(x, window.size), 0.0)
    return _rows(F.conv2d(image, kernels, bias, window.stride, 0, window.dilation, window.last))


def pool(kind: int, x: Tensor, constants: Sequence[float]) -> Tensor:
    """[N, H*W, C] -> [N, OH*OW, C]."""
    window = Window.of(constants)
    image = _planes(x, window.size)
    if kind == Pool.ADAPTIVE_AVG:
        return _rows(F.adaptive_avg_pool2d(image, window.out))
    if kind == Pool.MAX:
        padded = window.padded(image, -torch.inf)
        return _rows(F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation))
    sums = F.avg_pool2d(window.padded(image, 0.0), window.kernel, window.stride, divisor_override=1)
    if window.last > 0:
        return _rows(sums / window.last)
    height, width = (torch.tensor(window.counts(axis), dtype=x.dtype, device=x.device) for axis in (0, 1))
    return _rows(sums / (height[:, None] * width))


def normalise(
    kind: int, x: Tensor, eps: float, groups: int, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """[N, rows, F] with mean 0 and variance 1 over what the kind says, then times weight [F], plus bias [F]."""
    n, rows, features = x.shape
    shape = {
        Norm.BATCH: (1, n * rows, features, 1),
        Norm.GROUP: (n, rows, groups, features // groups),
        Norm.LAYER: (n * rows, 1, 1, features),
    }[Norm(kind)]
    grouped = x.reshape(shape)
    centred = grouped - grouped.mean((1, 3), keepdim=True)
    variance = centred.square().mean((1, 3), keepdim=True)
    out = (centred / torch.sqrt(variance + eps)).reshape(x.shape)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias
