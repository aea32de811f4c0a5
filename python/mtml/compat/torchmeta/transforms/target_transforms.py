"""Transforms of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtml_kernels.checks import shown

__all__ = ["DefaultTargetTransform", "SegmentationPairTransform", "TargetTransform"]


class TargetTransform:
    """Base: target -> target."""

    def __call__(self, target: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected __call__(target)")

    def __repr__(self) -> str:
        return type(self).__name__


class DefaultTargetTransform(TargetTransform):
    """(label, augmentation) -> (label, number of the augmentation, 0 for none)."""

    def __init__(self, class_augmentations: Sequence[Any]) -> None:
        self.class_augmentations = class_augmentations
        self._numbers = {None: 0} | {one: i for i, one in enumerate(class_augmentations, 1)}

    def __call__(self, target: Any) -> tuple[Any, int]:
        if not (isinstance(target, tuple) and len(target) == 2):
            raise ValueError(f"target: expected (label, augmentation), got {shown(target)}")
        label, augmentation = target
        return label, self._numbers[augmentation]


class SegmentationPairTransform:
    """Image and mask, PIL images, scaled to a square of `target_size` and made tensors; needs torchvision."""

    def __init__(self, target_size: int) -> None:
        try:
            from torchvision.transforms import Compose, InterpolationMode, Resize, ToTensor
        except ImportError as error:
            raise ImportError("SegmentationPairTransform needs torchvision: pip install torchvision") from error
        side = (target_size, target_size)
        self.image_transform = Compose([Resize(side), ToTensor()])
        self.mask_transform = Compose([Resize(side, interpolation=InterpolationMode.NEAREST), ToTensor()])

    def __call__(self, image: Any, mask: Any) -> tuple[Any, Any]:
        return self.image_transform(image), self.mask_transform(mask)
