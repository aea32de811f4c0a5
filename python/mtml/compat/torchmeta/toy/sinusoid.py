"""Sinusoids (Finn, Abbeel, Levine, 2017, arXiv 1703.03400)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mtml.compat.torchmeta.toy.curves import Curves

__all__ = ["Sinusoid"]


class Sinusoid(Curves):
    """y = A sin(x - phase): A uniform in [0.1, 5], phase in [0, pi], x in [-5, 5].

    Args:
        num_samples_per_task: N.
        num_tasks: how many there are.
        noise_std: of Gaussian noise on the targets; None for none.
        transform, target_transform: of an input and of a target, numpy arrays [1].
        dataset_transform: of a task, such as `transforms.ClassSplitter`.

    Example:
        >>> tasks = Sinusoid(10, num_tasks=100)
        >>> x, y = tasks[7][0]
        >>> x.shape, y.shape
        ((1,), (1,))
    """

    @cached_property
    def amplitudes(self) -> np.ndarray:
        return self._each(0.1, 5.0)

    @cached_property
    def phases(self) -> np.ndarray:
        return self._each(0.0, np.pi)

    def __getitem__(self, index: int) -> Any:
        amplitude, phase = self.amplitudes[index], self.phases[index]
        x = self._uniform(-5.0, 5.0)
        return self._task(index, x, amplitude * np.sin(x - phase))
