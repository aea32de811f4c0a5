"""Labels of any kind as class ids."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from mtml.compat.rate import count
from mtml.compat.torchmeta.transforms.target_transforms import TargetTransform

__all__ = ["Categorical", "FixedCategory"]


class Categorical(TargetTransform):
    """Labels -> 0..num_classes-1, each label the same id from its first appearance on, in an order drawn by torch.

    Args:
        num_classes: how many there are; None: ids count up as labels appear (a `CombinationMetaDataset` puts its own).

    Raises:
        ValueError: more labels than `num_classes`.

    Example:
        >>> transform = Categorical()
        >>> [transform(label) for label in ("b", "a", "b")]
        [0, 1, 0]
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = None if num_classes is None else count("num_classes", num_classes)
        self.reset()

    def reset(self) -> None:
        """Forget the labels seen so far."""
        self.classes: dict[Hashable, int] = {}
        self._ids: list[int] | None = None

    def __call__(self, target: Any) -> int:
        if target not in self.classes:
            self.classes[target] = self._next()
        return self.classes[target]

    def _next(self) -> int:
        known = len(self.classes)
        if self.num_classes is None:
            return known
        if known >= self.num_classes:
            raise ValueError(
                f"num_classes: expected at most {self.num_classes} different labels, one more came; after "
                f"{', '.join(map(repr, list(self.classes)[:5]))}"
            )
        if self._ids is None:
            self._ids = torch.randperm(self.num_classes).tolist()
        return self._ids[known]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_classes or ''})"


class FixedCategory:
    """label -> (label, transform): which augmentation a class came from."""

    def __init__(self, transform: Any = None) -> None:
        self.transform = transform

    def __call__(self, index: Any) -> tuple[Any, Any]:
        return index, self.transform

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"
