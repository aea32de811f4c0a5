"""Endless, seeded streams of meta-batches that can be entered at any position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtml.tasks.task_batch import TaskBatch

__all__ = ["TaskStream", "entropy"]


def entropy(seed: int, *counters: int) -> np.random.SeedSequence:
    """Independent randomness for each tuple of counters (stream, block, ...) under one seed."""
    return np.random.SeedSequence(seed, spawn_key=counters)


def check_counts(**counts: int) -> None:
    """Raise ValueError unless every count is a positive int."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value!r}")


class TaskStream(ABC):
    """Batch number i is a function of the seed and i alone, so continuing means remembering one number.

    Iterating never ends; `state_dict` and `load_state_dict` hold the position.
    """

    position: int = 0

    @abstractmethod
    def batch(self, index: int) -> TaskBatch:
        """Meta-batch number `index` (from 0), the same whenever and wherever it is asked for."""

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken."""
        self.position = int(state["position"])
