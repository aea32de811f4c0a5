"""Sinusoids and lines (Finn, Xu, Levine, 2018, arXiv 1806.02817)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from mtml.compat.torchmeta.toy.sinusoid import Sinusoid

__all__ = ["SinusoidAndLine"]


class SinusoidAndLine(Sinusoid):
    """Half of the tasks as of `Sinusoid`, half lines of slope and intercept uniform in [-3, 3]; its arguments."""

    @cached_property
    def is_sinusoid(self) -> np.ndarray:
        kinds = np.arange(self.num_tasks) >= self.num_tasks // 2
        self.np_random.shuffle(kinds)
        return kinds

    @cached_property
    def slopes(self) -> np.ndarray:
        return self._each(-3.0, 3.0)

    @cached_property
    def intercepts(self) -> np.ndarray:
        return self._each(-3.0, 3.0)

    def __getitem__(self, index: int) -> Any:
        if self.is_sinusoid[index]:
            return super().__getitem__(index)
        slope, intercept = self.slopes[index], self.intercepts[index]
        x = self._uniform(-5.0, 5.0)
        return self._task(index, x, intercept + slope * x)
