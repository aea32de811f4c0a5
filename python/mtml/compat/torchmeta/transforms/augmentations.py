"""Transforms of images that make new classes: PIL images, or tensors [..., H, W]."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["HorizontalFlip", "Rotation", "VerticalFlip"]


class Rotation:
    """Turn counterclockwise by `angle` degrees; a list of angles is a group, which gives one Rotation for each.

    Args:
        resample, expand, center: as of ``PIL.Image.rotate``, for PIL images.

    Raises:
        ValueError: a group that is called; a tensor and an angle that is no multiple of 90.
    """

    def __init__(
        self, angle: float | Sequence[float], resample: Any = False, expand: bool = False, center: Any = None
    ) -> None:
        self._angles: list[Any] = list(angle) if isinstance(angle, list | tuple) else [angle]
        self.angle: Any = None if isinstance(angle, list | tuple) else self._angles[0]
        self.resample, self.expand, self.center = resample, expand, center
        if self.angle is not None and self.angle % 360 == 0:
            warnings.warn(f"angle: turning by {angle} degrees makes no new class", stacklevel=2)

    def __iter__(self) -> Iterator[Rotation]:
        return (Rotation(angle, self.resample, self.expand, self.center) for angle in self._angles)

    def __call__(self, image: Any) -> Any:
        if self.angle is None:
            raise ValueError(f"angle: {self} is a group; iterate over it for its transforms")
        if not isinstance(image, torch.Tensor):
            return image.rotate(self.angle % 360, int(self.resample), self.expand, self.center)
        quarters, rest = divmod(self.angle, 90)
        if rest:
            raise ValueError(f"angle: expected a multiple of 90 for a tensor, got {self.angle}; turn the PIL image")
        return torch.rot90(image, int(quarters), (-2, -1))

    def __hash__(self) -> int:
        return hash(tuple(angle % 360 for angle in self._angles))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rotation) and [a % 360 for a in self._angles] == [a % 360 for a in other._angles]

    def __repr__(self) -> str:
        return f"Rotation({', '.join(str(a if self.angle is None else a % 360) for a in self._angles)})"


class _Flip:
    along: int  # the dimension of a tensor

    def __iter__(self) -> Iterator[_Flip]:
        return iter([type(self)()])

    def __call__(self, image: Any) -> Any:
        if isinstance(image, torch.Tensor):
            return image.flip(self.along)
        from PIL import Image

        kind = Image.Transpose.FLIP_LEFT_RIGHT if self.along == -1 else Image.Transpose.FLIP_TOP_BOTTOM
        return image.transpose(kind)

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class HorizontalFlip(_Flip):
    """Left becomes right."""

    along = -1


class VerticalFlip(_Flip):
    """Up becomes down."""

    along = -2
