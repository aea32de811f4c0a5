"""What a learner is worth on tasks it has not trained on, before and after each step of adaptation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import mtml
from mtml.tasks.task_batch import TaskBatch

__all__ = ["Estimate", "accuracies", "estimate", "losses"]


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval."""

    mean: float
    ci95: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.ci95:.3f}"


def estimate(values: Tensor) -> Estimate:
    """The mean of one value per task [T], with the normal 95 % interval of a mean over tasks."""
    values = values.double()
    spread = float(values.std()) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), 1.96 * spread / math.sqrt(len(values)))


@torch.no_grad()
def losses(maml: mtml.MAML, batch: TaskBatch, steps: int) -> Tensor:
    """The query loss of every task after `steps` steps: [T]."""
    return maml.meta_loss(batch, steps=steps)


@torch.no_grad()
def accuracies(maml: mtml.MAML, batch: TaskBatch, steps: int) -> Tensor:
    """The share of queries that each task's adapted network names rightly: [T]."""
    predicted = maml.meta_forward(batch, steps=steps).output.argmax(-1)  # [T, Q]
    return (predicted == batch.qy).double().mean(1)
