"""`mtml train multitask`: groups of tasks of several kinds, learned together and tested on new tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mtml
from mtml.tasks.files import atomic_write
from mtml.tasks.task_batch import TaskBatch
from mtml.train.adam import FlatAdam
from mtml.train.evaluate import Estimate, estimate
from mtml.train.loop import Budget, Loop, Progress
from mtml.train.multitask_groups import GROUPS, TEST, TRAIN, Streams, make_learner
from mtml.train.plots import plot_groups
from mtml.train.ranks import ALONE, Ranks

__all__ = ["GroupResult", "MultiTaskRun", "MultiTaskSettings", "table_text"]

TEST_TASKS, WATCHED_TASKS = 200, 32


@dataclass(frozen=True)
class MultiTaskSettings:
    """What defines a run."""

    groups: tuple[str, ...] = tuple(GROUPS)
    iterations: int | None = 3_000
    minutes: float | None = None
    meta_batch: int = 8
    steps: int = 5
    inner_lr: float = 0.1
    outer_lr: float = 1e-3
    weighting: str = "sum"
    seed: int = 0
    backend: str = "auto"

    def config(self) -> dict[str, Any]:
        """What must be equal where a checkpoint is continued."""
        free = ("iterations", "minutes", "backend")
        chosen = {k: v for k, v in asdict(self).items() if k not in free}
        return {"experiment": "multitask"} | chosen | {"groups": ",".join(self.groups)}


class GroupResult(NamedTuple):
    """Of one group's test tasks: the query loss by number of steps, and where it predicts classes the accuracy."""

    loss: dict[int, Estimate]
    accuracy: dict[int, Estimate]


class MultiTaskRun:
    """Training, evaluation and picture, in the order in which `mtml train multitask` does them."""

    def __init__(self, settings: MultiTaskSettings, folder: Path, ranks: Ranks = ALONE) -> None:
        self.settings, self.folder, self.ranks = settings, folder, ranks
        s = settings
        options = {"steps": s.steps, "weighting": s.weighting, "backend": s.backend}
        self.model: mtml.MultiTaskMAML = make_learner(s.groups, s.inner_lr, s.seed, **options)
        self.optimizer = FlatAdam(self.model.parameters(), lr=s.outer_lr)
        self.tasks = Streams(s.groups, s.meta_batch, s.seed, TRAIN)
        self._watched: dict[str, TaskBatch] | None = None

    def train(self, resume: bool = False) -> Progress:
        """Train by the settings; raises as `Loop.run`."""
        loop = Loop(
            step=self._step(),
            parts={"model": self.model, "optimizer": self.optimizer, "tasks": self.tasks},
            budget=Budget(self.settings.iterations, self.settings.minutes),
            folder=self.folder,
            config=self.settings.config(),
            columns=self.settings.groups,
            evaluate=self._evaluate,
            evaluate_seconds=5.0,
            ranks=self.ranks,
        )
        return loop.run(resume=resume)

    def _step(self) -> Callable[[], Tensor]:
        """A function that trains on the next meta-batches and returns all losses of this rank's share."""
        params = list(self.model.parameters())

        def step() -> Tensor:
            batches = next(self.tasks)
            counts = {name: batch.tasks for name, batch in batches.items()} if self.ranks.count > 1 else None
            shares = {name: self.ranks.share(batch) for name, batch in batches.items()}
            losses = self.model.meta_loss(shares, tasks=counts)
            self.optimizer.zero_grad()
            losses.total.backward()
            self.ranks.average(params)
            self.optimizer.step()
            return torch.cat([each.detach() for each in losses.per_task.values()])

        return step

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """{group: the query loss on test tasks}, for the log."""
        if self._watched is None:
            self._watched = next(Streams(self.settings.groups, WATCHED_TASKS, self.settings.seed, TEST))
        self.model.eval()
        found = self.model.meta_loss(self._watched)
        self.model.train()
        return {name: float(loss) for name, loss in found.per_group.items()}

    @torch.no_grad()
    def test(self) -> dict[str, GroupResult]:
        """Loss and accuracy on new tasks before adaptation, after half the steps, all of them, and twice as many."""
        steps = sorted({0, self.settings.steps // 2, self.settings.steps, 2 * self.settings.steps})
        batches = next(Streams(self.settings.groups, TEST_TASKS, self.settings.seed, TEST))
        return {name: self._tested(name, batch, steps) for name, batch in batches.items()}

    def _tested(self, name: str, batch: TaskBatch, steps: list[int]) -> GroupResult:
        adapted = self.model.transfer(name, None, batch.sx, batch.sy, steps[-1], keep_steps=True)
        losses = {k: estimate(adapted.loss(batch, step=k)) for k in steps}
        if batch.qy.is_floating_point():
            return GroupResult(losses, {})
        channels = 2 if GROUPS[name].head.channels == 1 else -1
        right = {k: adapted(batch.qx, step=k).argmax(channels) == batch.qy for k in steps}
        return GroupResult(losses, {k: estimate(each.double().flatten(1).mean(1)) for k, each in right.items()})

    def plot(self, found: Mapping[str, GroupResult]) -> Path:
        """Draw multitask.png."""
        by_step = {name: {k: (e.mean, e.ci95) for k, e in result.loss.items()} for name, result in found.items()}
        return plot_groups(self.folder / "log.csv", by_step, self.settings.steps, self.folder / "multitask.png")

    def save_results(self, progress: Progress, found: Mapping[str, GroupResult]) -> Path:
        """Write results.json."""
        results = {
            "settings": asdict(self.settings),
            "ranks": self.ranks.count,
            "iterations": progress.iteration,
            "seconds": progress.seconds,
            "groups": {
                name: {
                    kind: {str(k): value._asdict() for k, value in values.items()}
                    for kind, values in result._asdict().items()
                }
                for name, result in found.items()
            },
        }
        path = self.folder / "results.json"
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        return path


def table_text(found: Mapping[str, GroupResult]) -> str:
    """Loss and accuracy of every group by number of steps."""
    steps = list(next(iter(found.values())).loss)
    lines = [f"on {TEST_TASKS} new tasks of each group, with 95 % interval, after so many steps of the head:"]
    lines.append(f"{'':<22}" + "".join(f"{k:>18}" for k in steps))
    for name, result in found.items():
        lines.append(f"{name + ' loss':<22}" + "".join(f"{result.loss[k]!s:>18}" for k in steps))
        if result.accuracy:
            lines.append(f"{name + ' accuracy':<22}" + "".join(f"{result.accuracy[k]!s:>18}" for k in steps))
    return "\n".join(lines)
