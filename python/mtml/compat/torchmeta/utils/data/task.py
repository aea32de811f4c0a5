"""A task: a data set of samples (input, target) that knows how many classes it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from mtml.compat.torchmeta.compose import Compose

__all__ = ["ConcatTask", "Dataset", "SubsetTask", "Task"]

Transform = Callable[[Any], Any]


class Dataset(TorchDataset[Any]):
    """Samples of one class or task; `index` is its place in what it was taken from."""

    def __init__(self, index: Any, transform: Transform | None = None, target_transform: Transform | None = None):
        self.index, self.transform, self.target_transform = index, transform, target_transform

    def target_transform_append(self, transform: Transform | None) -> None:
        """Apply this to the targets as well, last."""
        if transform is not None:
            own = self.target_transform
            self.target_transform = transform if own is None else Compose([own, transform])

    def __hash__(self) -> int:
        return hash(self.index)


class Task(Dataset):
    """A task of `num_classes` classes; None for regression.

    A task that holds its samples in arrays may set ``arrays = (inputs [N, ...], targets [N, ...])``: loaders then take
    them as a whole where the task has no transforms.
    """

    arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(
        self,
        index: Any,
        num_classes: int | None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.num_classes = num_classes

    def whole(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All samples at once, inputs and targets, where that is all that indexing does."""
        return self.arrays if self.transform is None and self.target_transform is None else None


class ConcatTask(Task, ConcatDataset[Any]):
    """The samples of several classes as one task; each class's data set is copied, not changed."""

    def __init__(self, datasets: Sequence[Any], num_classes: int | None, target_transform: Transform | None = None):
        Task.__init__(self, tuple(dataset.index for dataset in datasets), num_classes)
        ConcatDataset.__init__(self, [copy.copy(dataset) for dataset in datasets])
        for dataset in self.datasets:
            dataset.target_transform_append(target_transform)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.index)


class SubsetTask(Task, Subset[Any]):
    """Some samples of a task."""

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        num_classes: int | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        Task.__init__(self, dataset.index, dataset.num_classes if num_classes is None else num_classes)
        if target_transform is not None:
            dataset = copy.copy(dataset)
            dataset.target_transform_append(target_transform)
        Subset.__init__(self, dataset, indices)

    def whole(self) -> tuple[np.ndarray, np.ndarray] | None:
        found = self.dataset.whole() if isinstance(self.dataset, Task) else None
        return None if found is None else (found[0][self.indices], found[1][self.indices])

    def __hash__(self) -> int:
        return hash((self.index, tuple(self.indices)))
