"""Transforms of tasks of images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.learn2learn.data.description import DataDescription
from mtml.compat.learn2learn.data.meta_dataset import MetaDataset

__all__ = ["RandomClassRotation"]


class RandomClassRotation:
    """Turn all images of a class by one of these angles, drawn for each class of a task; comes after `LoadData`.

    Args:
        dataset: a `MetaDataset` of PIL images or tensors [..., H, W].
        degrees: angles, counterclockwise. Others than multiples of 90 need torchvision for tensors.
    """

    def __init__(self, dataset: MetaDataset, degrees: Sequence[float]) -> None:
        self.dataset, self.degrees = dataset, list(degrees)

    def __call__(self, task_description: list[DataDescription]) -> list[DataDescription]:
        turns: dict[Any, _Turn] = {}
        for description in task_description:
            label = self.dataset.indices_to_labels[description.index]
            if label not in turns:
                turns[label] = _Turn(random.choice(self.degrees))
            description.transforms.append(turns[label])
        return task_description


class _Turn:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, sample: Any) -> tuple[Any, ...]:
        image, *rest = sample
        return self.of_images(image), *rest

    def of_images(self, image: Any) -> Any:
        """A PIL image, or images [..., H, W], turned."""
        if not isinstance(image, Tensor):
            return image.rotate(self.degrees)
        quarters, rest = divmod(self.degrees, 90)
        if not rest:
            return torch.rot90(image, int(quarters) % 4, (-2, -1))
        try:
            from torchvision.transforms.functional import rotate
        except ImportError as error:
            raise ImportError(
                f"degrees: expected multiples of 90 for tensors, got {self.degrees}; others need torchvision"
            ) from error
        return rotate(image, self.degrees)

    @staticmethod
    def together(turns: Sequence[_Turn], data: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The images of a task at once; None where they do not stay of one shape."""
        images, *rest = data
        if images.ndim < 3 or images.shape[-1] != images.shape[-2] or any(turn.degrees % 90 for turn in turns):
            return None
        turned = images.clone()
        for quarters in {int(turn.degrees // 90) % 4 for turn in turns} - {0}:
            rows = torch.tensor([int(turn.degrees // 90) % 4 == quarters for turn in turns], device=images.device)
            turned[rows] = torch.rot90(images[rows], quarters, (-2, -1))
        return turned, *rest
