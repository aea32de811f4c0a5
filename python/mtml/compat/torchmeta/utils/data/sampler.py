"""Indices of the tasks of a `CombinationMetaDataset`: tuples of classes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler

from mtml.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from mtml_kernels.checks import shown

__all__ = ["CombinationRandomSampler", "CombinationSequentialSampler"]


def _checked(data_source: Any) -> CombinationMetaDataset:
    if not isinstance(data_source, CombinationMetaDataset):
        raise TypeError(f"data_source: expected a CombinationMetaDataset, got {shown(data_source)}")
    return data_source


def _length(dataset: CombinationMetaDataset) -> int:
    with warnings.catch_warnings():  # nobody asked for the length
        warnings.simplefilter("ignore")
        return len(dataset)


class CombinationSequentialSampler(SequentialSampler):
    """Every combination of classes, in order."""

    def __init__(self, data_source: CombinationMetaDataset) -> None:
        super().__init__(_checked(data_source))
        self.tasks = data_source

    def __iter__(self) -> Iterator[Any]:
        return combinations(range(len(self.tasks.dataset)), self.tasks.num_classes_per_task)

    def __len__(self) -> int:
        return _length(self.tasks)


class CombinationRandomSampler(RandomSampler):
    """Random classes, by Python's `random`, for as many tasks as there are combinations."""

    def __init__(self, data_source: CombinationMetaDataset) -> None:
        length = _length(_checked(data_source))
        super().__init__(data_source, replacement=True, num_samples=length)
        self.tasks = data_source

    def __iter__(self) -> Iterator[Any]:
        classes = range(len(self.tasks.dataset))
        for _ in range(self.num_samples):
            yield tuple(random.sample(classes, self.tasks.num_classes_per_task))
