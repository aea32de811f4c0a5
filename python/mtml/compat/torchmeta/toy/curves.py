"""What sets of curves have in common: their parameters are drawn once, the points of a task whenever it is taken."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtml.compat.rate import count
from mtml.compat.torchmeta.utils.data.dataset import MetaDataset
from mtml.compat.torchmeta.utils.data.task import Task, Transform
from mtml_kernels.checks import check_number

__all__ = ["Curves", "Points"]


class Points(Task):
    """Inputs [N, 1] and targets [N, 1]."""

    def __init__(
        self,
        index: int,
        inputs: np.ndarray,
        targets: np.ndarray,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        super().__init__(index, None, transform=transform, target_transform=target_transform)
        self.arrays = inputs, targets
        self._inputs, self._targets, self.num_samples = inputs, targets, len(inputs)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self._inputs[index], self._targets[index]
        return (
            x if self.transform is None else self.transform(x),
            y if self.target_transform is None else self.target_transform(y),
        )


class Curves(MetaDataset):
    """Base of the toy data sets; arguments as of `Sinusoid`."""

    def __init__(
        self,
        num_samples_per_task: int,
        num_tasks: int = 1_000_000,
        noise_std: float | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Any = None,
    ) -> None:
        super().__init__(meta_split="train", target_transform=target_transform, dataset_transform=dataset_transform)
        self.num_samples_per_task = count("num_samples_per_task", num_samples_per_task)
        self.num_tasks = count("num_tasks", num_tasks)
        self.noise_std = None if noise_std is None else check_number("noise_std", noise_std, least=0)
        self.transform = transform

    def __len__(self) -> int:
        return self.num_tasks

    def _each(self, low: float, high: float) -> np.ndarray:
        """A number for every task."""
        return self.np_random.uniform(low, high, size=self.num_tasks)

    def _uniform(self, low: float, high: float) -> np.ndarray:
        """Inputs of one task: [N, 1]"""
        return self.stream().uniform(low, high, size=(self.num_samples_per_task, 1))

    def _task(self, index: int, inputs: np.ndarray, targets: np.ndarray) -> Any:
        if self.noise_std:
            targets = targets + self.noise_std * self.stream().randn(*targets.shape)
        return self._transformed(Points(index, inputs, targets, self.transform, self.target_transform))
