"""Planes of images [T, N, H W, C] as batches that PyTorch's convolutions and poolings take, and back."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from mtml_kernels.program.layers.window import Window

__all__ = ["Geometry", "batch", "geometry", "plane"]

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """A window and how the image is padded for it.

    padding: what the convolution itself adds on both sides. around: what is added before it (left, right, top, bottom)
    where the sides differ (`padding="same"` under an even kernel). ceil: the last window reaches past the padding.
    """

    window: Window
    padding: Pair
    around: tuple[int, int, int, int] | None
    ceil: bool


@functools.lru_cache(maxsize=1024)
def geometry(constants: tuple[float, ...]) -> Geometry:
    """Of a node's 13 constants."""
    window = Window.of(constants)
    if all(_outputs(window, axis, 0) == window.out[axis] for axis in (0, 1)):
        return Geometry(window, window.pad, None, False)
    if all(_outputs(window, axis, window.stride[axis] - 1) == window.out[axis] for axis in (0, 1)):
        return Geometry(window, window.pad, None, True)
    (top, bottom), (left, right) = _sides(window, 0), _sides(window, 1)
    return Geometry(window, (0, 0), (left, right, top, bottom), False)


def _span(window: Window, axis: int) -> int:
    return window.dilation[axis] * (window.kernel[axis] - 1) + 1


def _outputs(window: Window, axis: int, more: int) -> int:
    """Windows along an axis with the same padding on both sides and `more` points behind."""
    points = window.size[axis] + 2 * window.pad[axis] + more - _span(window, axis)
    return points // window.stride[axis] + 1


def _sides(window: Window, axis: int) -> Pair:
    reached = (window.out[axis] - 1) * window.stride[axis] + _span(window, axis)
    return window.pad[axis], reached - window.pad[axis] - window.size[axis]


def batch(x: Tensor, size: Pair, channels_of_tasks: bool) -> Tensor:
    """[T, N, H W, C] as [T N, C, H, W], or, every task's channels beside the others', as [N, T C, H, W]."""
    image = x.transpose(2, 3).unflatten(3, size)  # [T, N, C, H, W]
    return image.transpose(0, 1).flatten(1, 2) if channels_of_tasks else image.flatten(0, 1)


def plane(image: Tensor, tasks: int, channels_of_tasks: bool) -> Tensor:
    """The inverse of `batch`."""
    if channels_of_tasks:
        return image.unflatten(1, (tasks, -1)).flatten(3).permute(1, 0, 3, 2)
    return image.unflatten(0, (tasks, image.shape[0] // tasks)).flatten(3).transpose(2, 3)
