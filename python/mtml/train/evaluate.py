"""What a learner is worth on tasks it has not trained on, before and after each step of adaptation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import mtml
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.task_batch import TaskBatch

__all__ = ["Estimate", "Evaluation", "accuracies", "classify", "estimate", "losses"]


class Estimate(NamedTuple):
    """A mean over tasks and the half-width of its 95 % interval."""

    mean: float
    ci95: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.ci95:.3f}"


class Evaluation(NamedTuple):
    """Of a learner on T test tasks: accuracy before adaptation and after each step; and of the classes of the array
    that the tasks were drawn from, those in each task [T, N], the true ones of every query and those named after the
    last step [T, Q]."""

    accuracy: list[Estimate]
    drawn: np.ndarray
    true: np.ndarray
    named: np.ndarray

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.drawn)


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
def _named(maml: mtml.MAML, batch: TaskBatch, steps: int) -> Tensor:
    """The way that each task's adapted network takes every query for: [T, Q]."""
    named: Tensor = maml.meta_forward(batch, steps=steps).output.argmax(-1)
    return named


def accuracies(maml: mtml.MAML, batch: TaskBatch, steps: int) -> Tensor:
    """The share of queries that each task's adapted network names rightly: [T]."""
    return (_named(maml, batch, steps) == batch.qy).double().mean(1)


def classify(maml: mtml.MAML, episodes: ImageEpisodes, tasks: int, steps: int) -> Evaluation:
    """Judge the learner on the first `tasks` tasks of a stream, before adaptation and after each of `steps` steps.

    Where layers normalise by batch statistics, a query set is normalised by its own, as published: its queries are
    classified together (transductively).
    """
    right: list[list[Tensor]] = [[] for _ in range(steps + 1)]
    drawn, true, named = [], [], []
    for index in range(math.ceil(tasks / episodes.tasks)):
        batch, classes = episodes.batch(index), episodes.classes(index)
        for k in range(steps + 1):
            ways = _named(maml, batch, k)
            right[k].append((ways == batch.qy).double().mean(1))
        drawn.append(classes)
        true.append(np.take_along_axis(classes, batch.qy.numpy(), 1))
        named.append(np.take_along_axis(classes, ways.numpy(), 1))
    first = slice(tasks)
    return Evaluation(
        [estimate(torch.cat(parts)[first]) for parts in right],
        *(np.concatenate(parts)[first] for parts in (drawn, true, named)),
    )
