"""Random numbers of what lives in a data set, and so in the copies of it that a loader's workers are."""

from __future__ import annotations

import copy

import numpy as np
import torch

__all__ = ["Draws"]


class Draws:
    """`np_random`, and `stream`, which is another in each worker."""

    np_random: np.random.RandomState
    _of_worker: tuple[int, np.random.RandomState] | None = None

    def seed(self, seed: int | None = None) -> None:
        """Start the random numbers anew."""
        self.np_random = np.random.RandomState(seed)
        self._of_worker = None

    def stream(self) -> np.random.RandomState:
        """Random numbers for one task: `np_random`, and in a loader's worker ones of its own.

        Workers are copies of one process: from `np_random` they would all draw the same. By the seeds of this object
        and of torch, from which a loader takes its workers', the draws are the same again.
        """
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self.np_random
        if self._of_worker is None or self._of_worker[0] != worker.seed:
            drawn = copy.deepcopy(self.np_random).randint(2**31)  # what is drawn of it later stays what it is
            self._of_worker = worker.seed, np.random.RandomState([worker.seed % 2**32, drawn])
        return self._of_worker[1]
