"""`mtml train sinusoid`: the regression experiment of the MAML paper, from training to the published table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mtml
from mtml.tasks.files import atomic_write
from mtml.tasks.sinusoids import Sinusoids, SinusoidTasks, draw_sinusoids
from mtml.tasks.stream import entropy
from mtml.tasks.task_batch import TaskBatch
from mtml.train.adam import FlatAdam
from mtml.train.compare import Comparison, compare
from mtml.train.evaluate import Estimate, estimate, losses
from mtml.train.loop import Budget, Loop, Progress
from mtml.train.methods import engine_step, make_maml
from mtml.train.models import mlp
from mtml.train.plots import AdaptedTask, plot_sinusoids
from mtml.train.ranks import ALONE, Ranks

__all__ = ["PUBLISHED", "SinusoidRun", "SinusoidSettings"]

PUBLISHED = {5: (1.13, 0.90), 10: (0.85, 0.63), 20: (0.71, 0.50)}  # shots: MAML, Meta-SGD (Meta-SGD paper)
FREQUENCY = {"finn2017": (1.0, 1.0), "meta-sgd": (0.8, 1.2)}  # bounds of the tasks' angular frequency in either paper
TEST_TASKS, TEST_POINTS = 100, 100
SHOWN_STEPS, SHOWN_TASKS = (0, 1, 5, 10), 3
TRAIN, TEST, SHOWN, COMPARED = range(4)  # independent streams of tasks under one seed


@dataclass(frozen=True)
class SinusoidSettings:
    """What defines a run; the defaults are those of the MAML paper."""

    iterations: int = 70_000
    minutes: float | None = None
    meta_batch: int = 25
    shots: int = 10
    steps: int = 1
    inner_lr: float = 0.01
    outer_lr: float = 1e-3
    init: str = "torch"
    tasks: str = "finn2017"
    meta_sgd: bool = False
    seed: int = 0
    backend: str = "auto"
    plain_seconds: float = 5.0

    def config(self) -> dict[str, Any]:
        """What must be equal where a checkpoint is continued: everything but how long, and by which equal path."""
        free = ("iterations", "minutes", "backend", "plain_seconds")
        return {"experiment": "sinusoid"} | {k: v for k, v in asdict(self).items() if k not in free}

    def demo(self) -> SinusoidSettings:
        """The setting of the published table, in about a minute on any machine."""
        return replace(self, tasks="meta-sgd", shots=5, iterations=60_000, minutes=0.75)


class SinusoidRun:
    """Training, evaluation, picture and comparison, in the order in which `mtml train sinusoid` does them."""

    def __init__(self, settings: SinusoidSettings, folder: Path, ranks: Ranks = ALONE) -> None:
        self.settings, self.folder, self.ranks = settings, folder, ranks
        model = mlp((1, 40, 40, 1), init=settings.init, seed=settings.seed)
        per = "element" if settings.meta_sgd else None
        self.maml: mtml.MAML = make_maml(
            model, lr=settings.inner_lr, steps=settings.steps, loss="mse", per=per, backend=settings.backend
        )
        self.optimizer = FlatAdam(self.maml.parameters(), lr=settings.outer_lr)
        self.tasks = self.stream(TRAIN)

    def stream(self, number: int) -> Sinusoids:
        """A stream of meta-batches like those of training."""
        s = self.settings
        return Sinusoids(s.shots, tasks=s.meta_batch, seed=s.seed, frequency=FREQUENCY[s.tasks], stream=number)

    def train(self, resume: bool = False) -> Progress:
        """Train by the settings; raises as `Loop.run`."""
        loop = Loop(
            step=engine_step(self.maml, self.optimizer, self.tasks, ranks=self.ranks),
            parts={"model": self.maml, "optimizer": self.optimizer, "tasks": self.tasks},
            budget=Budget(self.settings.iterations, self.settings.minutes),
            folder=self.folder,
            config=self.settings.config(),
            ranks=self.ranks,
        )
        return loop.run(resume=resume)

    def _draw(self, tasks: int, points: int, stream: int) -> SinusoidTasks:
        """Fresh tasks, the same in every run with this seed."""
        seed = int(entropy(self.settings.seed, stream).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return draw_sinusoids((tasks,), points, generator, frequency=FREQUENCY[self.settings.tasks])

    def table(self) -> dict[int, Estimate]:
        """Mean squared error on 100 fresh tasks, after as many steps as in training, by number of shots."""
        most = max(PUBLISHED)
        drawn = self._draw(TEST_TASKS, most + TEST_POINTS, TEST)
        x, y = drawn.x, drawn.y  # [T, 20 + 100, 1]: the same tasks and query points at every number of shots
        return {
            shots: estimate(
                losses(self.maml, TaskBatch(x[:, :shots], y[:, :shots], x[:, most:], y[:, most:]), self.settings.steps)
            )
            for shots in PUBLISHED
        }

    @torch.no_grad()
    def shown(self) -> list[AdaptedTask]:
        """Curves of the network on fresh tasks before adaptation and after 1, 5 and 10 steps."""
        drawn = self._draw(SHOWN_TASKS, self.settings.shots, SHOWN)
        x = torch.linspace(-5, 5, 200)[:, None].expand(SHOWN_TASKS, 200, 1).contiguous()
        truth = drawn.curve(x)
        curves = {
            k: self.maml.meta_forward(drawn.x, drawn.y, x, truth, steps=k).output.reshape(SHOWN_TASKS, -1).numpy()
            for k in SHOWN_STEPS
        }
        line = x[0, :, 0].numpy()
        return [
            AdaptedTask(
                line,
                truth[t, :, 0].numpy(),
                drawn.x[t, :, 0].numpy(),
                drawn.y[t, :, 0].numpy(),
                {k: curve[t] for k, curve in curves.items()},
            )
            for t in range(SHOWN_TASKS)
        ]

    def plot(self) -> Path:
        """Draw sinusoid.png."""
        return plot_sinusoids(self.folder / "log.csv", self.shown(), self.folder / "sinusoid.png")

    def compare(self) -> Comparison:
        """The plain PyTorch loop beside the engine, on tasks of their own."""
        s = self.settings
        return compare(self.maml, lambda: self.stream(COMPARED), loss="mse", lr=s.outer_lr, seconds=s.plain_seconds)

    def save_results(self, progress: Progress, table: dict[int, Estimate], comparison: Comparison) -> Path:
        """Write results.json."""
        results = {
            "settings": asdict(self.settings),
            "ranks": self.ranks.count,
            "iterations": progress.iteration,
            "seconds": progress.seconds,
            "mse": {str(shots): value._asdict() for shots, value in table.items()},
            "comparison": comparison._asdict(),
        }
        path = self.folder / "results.json"
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        return path


def table_text(table: dict[int, Estimate], settings: SinusoidSettings, iterations: int) -> str:
    """The table of errors beside the published one."""
    steps = f"{settings.steps} step" + ("s" if settings.steps > 1 else "")
    name = "Meta-SGD" if settings.meta_sgd else "MAML"
    lines = [
        f"mean squared error on {TEST_TASKS} test tasks x {TEST_POINTS} points after {steps}, with 95 % interval "
        f"({name} trained with {settings.shots} shots for {iterations} iterations)",
        f"{'shots':>5}  {'this run':>15}  {'MAML, published':>15}  {'Meta-SGD, published':>19}",
    ]
    for shots, (maml, meta_sgd) in PUBLISHED.items():
        lines.append(f"{shots:>5}  {table[shots]!s:>15}  {maml:>15.2f}  {meta_sgd:>19.2f}")
    lines.append(
        "(published: Li et al. 2017, Meta-SGD; 5-shot training, 60000 iterations, 1 step, frequencies 0.8 to 1.2)"
    )
    if settings.tasks != "meta-sgd":
        lines.append("(these tasks have frequency 1 and are easier: compare with --tasks meta-sgd --shots 5)")
    return "\n".join(lines)
