"""Sums of two sinusoids (Lacoste et al., 2018, arXiv 1806.07528)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mtml.compat.torchmeta.toy.curves import Curves
from mtml.compat.torchmeta.utils.data.task import Transform

__all__ = ["Harmonic"]


class Harmonic(Curves):
    """y = a1 sin(w x + b1) + a2 sin(2 w x + b2): a normal, b uniform in [0, 2 pi], w in [5, 7], x normal around m.

    m, the task's place, is uniform in [-4, 4]. Arguments as of `Sinusoid`, with 5000 tasks by default.
    """

    def __init__(
        self,
        num_samples_per_task: int,
        num_tasks: int = 5000,
        noise_std: float | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Any = None,
    ) -> None:
        super().__init__(num_samples_per_task, num_tasks, noise_std, transform, target_transform, dataset_transform)

    @cached_property
    def domains(self) -> np.ndarray:
        return self._each(-4.0, 4.0)

    @cached_property
    def frequencies(self) -> np.ndarray:
        return self._each(5.0, 7.0)

    @cached_property
    def phases(self) -> np.ndarray:
        return self.np_random.uniform(0.0, 2 * np.pi, size=(self.num_tasks, 2))

    @cached_property
    def amplitudes(self) -> np.ndarray:
        return self.np_random.randn(self.num_tasks, 2)

    def __getitem__(self, index: int) -> Any:
        domain, frequency = self.domains[index], self.frequencies[index]
        (b1, b2), (a1, a2) = self.phases[index], self.amplitudes[index]
        x = domain + self.stream().randn(self.num_samples_per_task, 1)
        return self._task(index, x, a1 * np.sin(frequency * x + b1) + a2 * np.sin(2 * frequency * x + b2))
