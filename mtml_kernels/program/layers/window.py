"""Windows that slide over an image: the numbers of a convolution's or a pooling's node, and what they cover.

Images are [N, H*W, C]. The numbers are H, W, OH, OW, kh, kw, sh, sw, ph, pw, dh, dw, and the groups or the divisor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.program.activations import Constants
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.values import Value, tensor

__all__ = ["WINDOW_CONSTANTS", "Axis", "Window", "constants", "image_of", "planes", "rows", "sizes"]

WINDOW_CONSTANTS = 13
Pair = tuple[int, int]


class Axis(NamedTuple):
    """One dimension of an image under a sliding window; `pad` is what is added before it."""

    size: int
    out: int
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1


_LINE = Axis(1, 1)  # the height of a sequence


def constants(axes: Sequence[Axis], last: float) -> Constants:
    """H, W, OH, OW, kh, kw, ..., then the groups or the divisor."""
    height, width = axes if len(axes) == 2 else (_LINE, *axes)
    return (*(float(v) for pair in zip(height, width, strict=True) for v in pair), float(last))


def image_of(x: object, dims: int) -> Value:
    """The operand, which must be a batch of images with so many dimensions of space."""
    value = tensor(x)
    if not value.batched or len(value.shape) != dims + 1:
        raise Cannot(f"it takes a batch [N, C, {'L' if dims == 1 else 'H, W'}], got {value}")
    return value


def sizes(value: Any, dims: int, name: str) -> list[int]:
    """A number for all dimensions, or one for each."""
    found = [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
    if len(found) != dims or not all(isinstance(size, int) for size in found):
        raise Cannot(f"its {name} {value} is not {dims} plain sizes")
    return found


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
        """From a node's constants."""
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


def planes(x: Tensor, size: Pair) -> Tensor:
    """[N, H*W, C] as [N, C, H, W]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def rows(image: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H*W, C]."""
    return image.flatten(2).transpose(1, 2)
