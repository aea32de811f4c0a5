"""Loaders of tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import default_collate

from mtml.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from mtml.compat.torchmeta.utils.data.sampler import CombinationRandomSampler, CombinationSequentialSampler
from mtml.compat.torchmeta.utils.data.task import Task
from mtml_kernels.checks import shown

__all__ = ["BatchMetaCollate", "BatchMetaDataLoader", "MetaDataLoader", "no_collate"]


class BatchMetaCollate:
    """Stack the samples of every task, then the tasks; {name: task} becomes {name: stacked tasks}."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def collate_task(self, task: Any) -> Any:
        """The samples of one task, or of each part of it."""
        if isinstance(task, TorchDataset):
            whole = task.whole() if isinstance(task, Task) and self.collate_fn is default_collate else None
            if whole is not None:
                return [torch.as_tensor(array) for array in whole]
            return self.collate_fn([task[i] for i in range(len(task))])  # type: ignore[arg-type]
        if isinstance(task, OrderedDict):
            return OrderedDict((key, self.collate_task(part)) for key, part in task.items())
        raise TypeError(f"task: expected a Dataset or an OrderedDict of such (see ClassSplitter), got {shown(task)}")

    def __call__(self, batch: list[Any]) -> Any:
        return self.collate_fn([self.collate_task(task) for task in batch])


def no_collate(batch: Any) -> Any:
    """The tasks as a list."""
    return batch


class MetaDataLoader(DataLoader[Any]):
    """Batches of tasks, as lists; arguments as of `torch.utils.data.DataLoader`, shuffled by default."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool = True,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataset, CombinationMetaDataset) and sampler is None and batch_sampler is None:
            sampler = CombinationRandomSampler(dataset) if shuffle else CombinationSequentialSampler(dataset)
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle and sampler is None and batch_sampler is None,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn or no_collate,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            **kwargs,
        )


class BatchMetaDataLoader(MetaDataLoader):
    """Batches of tasks, stacked: with a `ClassSplitter`, {"train": [x, y], "test": [x, y]} of [T, N, ...] each.

    Example:
        >>> from mtml.compat.torchmeta.toy.helpers import sinusoid
        >>> loader = BatchMetaDataLoader(sinusoid(shots=5, test_shots=15, seed=0), batch_size=4)
        >>> x, y = next(iter(loader))["test"]
        >>> tuple(x.shape), tuple(y.shape)
        ((4, 15, 1), (4, 15, 1))
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = True,
        sampler: Any = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=BatchMetaCollate(default_collate),
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            **kwargs,
        )
