"""Tasks as batches of an ordinary loader."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from mtml.compat.learn2learn.data.description import DataDescription
from mtml.compat.learn2learn.data.task_dataset import Taskset

__all__ = ["TasksetSampler"]


class TasksetSampler(Sampler[list[int]]):
    """The samples of a `Taskset`'s tasks, for ``DataLoader(dataset, batch_sampler=...)``; labels stay the data set's.

    Args:
        shuffle: the tasks in random order.
    """

    def __init__(self, taskset: Taskset, shuffle: bool = True) -> None:
        self.taskset, self.shuffle = taskset, shuffle

    def description2indices(self, task_description: list[DataDescription]) -> list[int]:
        """The indices in a task description."""
        return [description.index for description in task_description]

    def __iter__(self) -> Iterator[list[int]]:
        taskset = self.taskset
        while taskset.num_tasks == -1:
            yield self.description2indices(taskset.sample_task_description())
        order = list(range(taskset.num_tasks))
        if self.shuffle:
            random.shuffle(order)
        for i in order:
            if i not in taskset.sampled_descriptions:
                taskset.sampled_descriptions[i] = taskset.sample_task_description()
            yield self.description2indices(taskset.sampled_descriptions[i])
