"""Transforms of task descriptions, lists of `DataDescription`: which samples a task has, and what is done to each.

The first of a `Taskset`'s transforms is given None, which stands for all samples of the data set. Random choices are
Python's `random`, in the original's order: the same seed gives the same tasks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.learn2learn.data.description import DataDescription
from mtml.compat.learn2learn.data.meta_dataset import MetaDataset, together
from mtml.compat.learn2learn.data.utils import column
from mtml.compat.rate import count as whole

__all__ = [
    "ConsecutiveLabels",
    "FilterLabels",
    "FusedNWaysKShots",
    "KShots",
    "LoadData",
    "NWays",
    "RemapLabels",
    "TaskTransform",
]

Description = list[DataDescription]


class TaskTransform:
    """Base of transforms over a data set.

    Args:
        dataset: a `MetaDataset`, or for those that read no labels any data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def new_task(self) -> Description:
        """All samples of the data set."""
        return [DataDescription(index) for index in range(len(self.dataset))]

    def __call__(self, task_description: Description | None) -> Description:
        return self.new_task() if task_description is None else task_description


class _ByLabel(TaskTransform):
    """Base of those that read labels."""

    def __init__(self, dataset: MetaDataset) -> None:
        if not hasattr(dataset, "indices_to_labels"):
            raise TypeError(
                f"dataset: expected a MetaDataset, got {type(dataset).__name__}; wrap it: MetaDataset(dataset)"
            )
        super().__init__(dataset)


class LoadData(TaskTransform):
    """Index -> the data set's sample."""

    def __call__(self, task_description: Description | None) -> Description:
        task_description = super().__call__(task_description)
        load = _Load(self.dataset)
        for description in task_description:
            description.transforms.append(load)
        return task_description


class _Load:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Any:
        return self.dataset[index]

    def load_together(self, indices: Sequence[int]) -> tuple[Tensor, ...] | None:
        """All samples at once where the data set allows it."""
        return together(self.dataset, indices)


class FilterLabels(_ByLabel):
    """Keep the samples of these labels."""

    def __init__(self, dataset: MetaDataset, labels: Sequence[Any]) -> None:
        super().__init__(dataset)
        self.labels = list(labels)
        self._kept = set(self.labels)

    def __call__(self, task_description: Description | None) -> Description:
        labels = self.dataset.indices_to_labels
        return [d for d in super().__call__(task_description) if labels[d.index] in self._kept]


class ConsecutiveLabels(_ByLabel):
    """Sort the samples by their labels in the data set, stably."""

    def __call__(self, task_description: Description | None) -> Description:
        labels = self.dataset.indices_to_labels
        return sorted(super().__call__(task_description), key=lambda description: labels[description.index])


def _present(labels: Any, description: Description) -> list[Any]:
    """The labels of a task. Numbers in the original's order, which seeds depend on; others as they come."""
    found = dict.fromkeys(labels[d.index] for d in description)
    return list(set(found)) if all(isinstance(label, int) for label in found) else list(found)


class RemapLabels(_ByLabel):
    """The K labels of a task -> 0..K-1, in random order unless ``shuffle=False``; comes after `LoadData`."""

    def __init__(self, dataset: MetaDataset, shuffle: bool = True) -> None:
        super().__init__(dataset)
        self.shuffle = shuffle

    def __call__(self, task_description: Description | None) -> Description:
        task_description = super().__call__(task_description)
        labels = _present(self.dataset.indices_to_labels, task_description)
        if self.shuffle:
            random.shuffle(labels)
        remap = _Remap(labels)
        for description in task_description:
            description.transforms.append(remap)
        return task_description


class _Remap:
    def __init__(self, labels: list[Any]) -> None:
        self.ids = {label: i for i, label in enumerate(labels)}

    def __call__(self, sample: Any) -> list[Any]:
        sample = list(sample)
        label = sample[1].item() if hasattr(sample[1], "item") else sample[1]
        sample[1] = self.ids[label]
        return sample

    @staticmethod
    def together(remaps: Sequence[_Remap], data: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The same for all samples of a task at once."""
        x, y, *rest = data
        if y.numel() != len(y):
            return None
        y = column(y)
        ids = [remap.ids[label] for remap, label in zip(remaps, y.tolist(), strict=True)]
        return x, torch.tensor(ids, device=y.device), *rest


def _sample(argument: str, of: str, population: Sequence[Any], count: int) -> list[Any]:
    """`count` distinct ones; ValueError where there are fewer."""
    count = whole(argument, count, least=0)
    if not 0 <= count <= len(population):
        raise ValueError(f"{argument}: expected at most the {len(population)} {of}, got {count}")
    return random.sample(population, k=count)


class NWays(_ByLabel):
    """Keep the samples of `n` random labels.

    Raises:
        ValueError: when called, for more labels than there are.
    """

    def __init__(self, dataset: MetaDataset, n: int = 2) -> None:
        super().__init__(dataset)
        self.n = n

    def new_task(self) -> Description:
        chosen = _sample("n", "labels of the data set", self.dataset.labels, self.n)
        return [DataDescription(index) for label in chosen for index in self.dataset.labels_to_indices[label]]

    def __call__(self, task_description: Description | None) -> Description:
        if task_description is None:
            return self.new_task()
        labels = self.dataset.indices_to_labels
        chosen = set(_sample("n", "labels of the task", _present(labels, task_description), self.n))
        return [d for d in task_description if labels[d.index] in chosen]


class KShots(_ByLabel):
    """Keep `k` random samples of every label; with `replacement` some may come twice.

    Raises:
        ValueError: when called, for a label of fewer samples.
    """

    def __init__(self, dataset: MetaDataset, k: int = 1, replacement: bool = False) -> None:
        super().__init__(dataset)
        self.k, self.replacement = k, replacement

    def __call__(self, task_description: Description | None) -> Description:
        members: dict[Any, Description] = {}
        for description in super().__call__(task_description):
            members.setdefault(self.dataset.indices_to_labels[description.index], []).append(description)
        return [one for label, mine in members.items() for one in self._drawn(label, mine)]

    def _drawn(self, label: Any, members: Description) -> Description:
        if self.replacement:
            return [_own(one) for one in random.choices(members, k=self.k)]
        return _sample("k", f"samples of label {label!r}", members, self.k)


def _own(description: DataDescription) -> DataDescription:
    """A description with a list of transforms of its own."""
    new = DataDescription(description.index)
    new.transforms = list(description.transforms)
    return new


class FusedNWaysKShots(_ByLabel):
    """`FilterLabels`, `NWays` and `KShots` in one; as the first transform it looks at the chosen samples alone.

    Args:
        n, k, replacement: as of `NWays` and `KShots`.
        filter_labels: the labels to choose from; None: all.

    Raises:
        ValueError: when called, for too few labels or samples.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = MetaDataset(TensorDataset(torch.randn(20, 3), torch.arange(20) % 4))
        >>> len(FusedNWaysKShots(data, n=2, k=3)(None))
        6
    """

    def __init__(
        self,
        dataset: MetaDataset,
        n: int = 2,
        k: int = 1,
        replacement: bool = False,
        filter_labels: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(dataset)
        self.n, self.k, self.replacement = n, k, replacement
        self.filter_labels = list(dataset.labels if filter_labels is None else filter_labels)
        self._parts: list[Callable[..., Description]] = [
            FilterLabels(dataset, self.filter_labels),
            NWays(dataset, n),
            KShots(dataset, k, replacement),
        ]

    def new_task(self) -> Description:
        chosen = _sample("n", "labels to choose from", self.filter_labels, self.n)
        return [DataDescription(index) for label in chosen for index in self._drawn(label)]

    def _drawn(self, label: Any) -> list[int]:
        members = self.dataset.labels_to_indices.get(label, ())
        if self.replacement and members:
            return [random.choice(members) for _ in range(self.k)]
        return _sample("k", f"samples of label {label!r}", members, self.k)

    def __call__(self, task_description: Description | None) -> Description:
        if task_description is None:
            return self.new_task()
        for part in self._parts:
            task_description = part(task_description)
        return task_description
