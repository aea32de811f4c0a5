"""Sets of tasks drawn from one data set."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mtml.compat.learn2learn.data.description import DataDescription
from mtml.compat.learn2learn.data.meta_dataset import MetaDataset
from mtml.compat.learn2learn.data.utils import partition_task
from mtml.compat.rate import number
from mtml.tasks import TaskBatch, collate
from mtml_kernels.checks import shown

__all__ = ["DataDescription", "TaskDataset", "Taskset"]

Description = list[DataDescription]


class Taskset(Dataset[Any]):
    """Tasks, each the samples that the transforms leave of the data set, collated.

    Of `num_tasks` tasks each is drawn when first asked for and stays the same; with -1 every one is new, and the length
    is 1. Where the data are tensors (a TensorDataset or an `OnDeviceDataset` in `MetaDataset`s) and the transforms
    those of this package, a task's samples are taken together.

    Args:
        dataset: a `MetaDataset`, or a data set to make one of.
        task_transforms: a list of transforms of task descriptions, or one callable.
        num_tasks: how many tasks; -1: endless.
        task_collate: makes a task of its samples; torch's default_collate by default.

    Raises:
        ValueError: `num_tasks` is neither -1 nor positive.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from mtml.compat.learn2learn.data import MetaDataset, transforms
        >>> data = MetaDataset(TensorDataset(torch.randn(40, 3), torch.arange(40) % 8))
        >>> way = [transforms.FusedNWaysKShots(data, n=5, k=2), transforms.LoadData(data), transforms.RemapLabels(data)]
        >>> tasks = Taskset(data, way, num_tasks=100)
        >>> x, y = tasks.sample()
        >>> tuple(x.shape), sorted(y.tolist())
        ((10, 3), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
        >>> tuple(tasks.batch(8, shots=1).qx.shape)
        (8, 5, 3)
    """

    def __init__(
        self,
        dataset: Any,
        task_transforms: Sequence[Callable[..., Any]] | Callable[..., Any] | None = None,
        num_tasks: int = -1,
        task_collate: Callable[..., Any] | None = None,
    ) -> None:
        tasks = number(num_tasks)
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < -1 or tasks == 0:
            raise ValueError(f"num_tasks: expected -1 (endless) or a positive int, got {shown(num_tasks)}")
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.task_transforms: Any = [] if task_transforms is None else task_transforms
        self.num_tasks = tasks
        self.task_collate = default_collate if task_collate is None else task_collate
        self.sampled_descriptions: dict[int, Description] = {}
        self._task_id = 0

    def sample_task_description(self) -> Description:
        """Which samples a new task has."""
        if callable(self.task_transforms):
            return self.task_transforms(None)
        description: Any = None
        for transform in self.task_transforms:
            description = transform(description)
        if description is None:
            raise ValueError("task_transforms: expected at least one, as [LoadData(dataset)], got none")
        return description

    def get_task(self, task_description: Description) -> Any:
        """The data of a task."""
        if self.task_collate is default_collate:
            together = _together(task_description)
            if together is not None:
                return list(together)
        return self.task_collate([_loaded(description) for description in task_description])

    def sample(self) -> Any:
        """The data of a random task."""
        return self[random.randint(0, len(self) - 1)]

    def batch(self, tasks: int, shots: int) -> TaskBatch:
        """`tasks` random tasks, each divided by `partition_task`: what ``meta_loss`` takes."""
        parts = []
        for _ in range(tasks):
            x, y = self.sample()
            support, query = partition_task(x, y, shots)
            parts.append((*support, *query))
        return collate(parts)

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, i: int) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self.sample_task_description())
        if not 0 <= i < self.num_tasks:
            raise IndexError(f"index: expected 0..{self.num_tasks - 1}, got {i}")
        if i not in self.sampled_descriptions:
            self.sampled_descriptions[i] = self.sample_task_description()
        return self.get_task(self.sampled_descriptions[i])

    def __iter__(self) -> Iterator[Any]:
        self._task_id = 0  # for next(taskset)
        i = 0
        while self.num_tasks == -1 or i < self.num_tasks:
            yield self[i]
            i += 1

    def __next__(self) -> Any:
        if self.num_tasks != -1 and self._task_id >= self.num_tasks:
            raise StopIteration
        self._task_id += 1
        return self[self._task_id - 1]

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError("Taskset + Taskset: make a Taskset of a UnionMetaDataset of their data sets")


class TaskDataset(Taskset):
    """The former name of `Taskset`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warnings.warn("TaskDataset is called Taskset now", DeprecationWarning, stacklevel=2)


def _loaded(description: DataDescription) -> Any:
    data: Any = description.index
    for transform in description.transforms:
        data = transform(data)
    return data


def _together(task: Description) -> tuple[Tensor, ...] | None:
    """The task's data at once; None where a transform works on single samples only."""
    if not task or not task[0].transforms or len({len(description.transforms) for description in task}) > 1:
        return None
    loads, *columns = zip(*[description.transforms for description in task], strict=True)
    if not hasattr(loads[0], "load_together") or any(load is not loads[0] for load in loads):
        return None
    data: tuple[Tensor, ...] | None = loads[0].load_together([description.index for description in task])
    for column in columns:
        kind: Any = type(column[0])
        if data is None or not hasattr(kind, "together") or any(type(each) is not kind for each in column):
            return None
        data = kind.together(column, data)
    return data
