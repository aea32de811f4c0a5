"""`mtml train omniglot`: few-shot classification of handwritten characters with a multilayer perceptron."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mtml
from mtml.tasks._files import atomic_write
from mtml.tasks.digits import load_digits
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.omniglot import split_omniglot
from mtml.tasks.prefetch import Prefetch
from mtml.train.adam import FlatAdam
from mtml.train.compare import Comparison, compare
from mtml.train.evaluate import Estimate, accuracies, estimate
from mtml.train.loop import Budget, Loop, Progress
from mtml.train.methods import engine_step, make_maml, plain_step
from mtml.train.models import mlp
from mtml.train.plots import ImageTask, plot_images
from mtml.train.presets import Preset

__all__ = ["OmniglotRun", "OmniglotSettings", "table_text"]

HIDDEN = (256, 128, 64, 64)
DIGIT_HIDDEN = (128, 64)
TEST_TASKS, LOG_TASKS, CHUNK, TEST_QUERIES = 1000, 200, 50, 15
TRAIN, LOGGED, TEST, SHOWN, COMPARED = range(5)  # independent streams of tasks under one seed


@dataclass(frozen=True)
class OmniglotSettings:
    """What defines a run; without `data` it takes scikit-learn's digits."""

    data: Path | None
    preset: Preset
    ways: int = 5
    shots: int = 1
    minutes: float | None = None
    iterations: int | None = None
    validation: int = 0
    seed: int = 0
    backend: str = "auto"
    plain: bool = False
    plain_seconds: float = 5.0

    @property
    def budget(self) -> Budget:
        """20 minutes on Omniglot and one on the digits, where neither minutes nor iterations are given."""
        if self.minutes is None and self.iterations is None:
            return Budget(minutes=1.0 if self.data is None else 20.0)
        return Budget(self.iterations, self.minutes)

    @property
    def title(self) -> str:
        """One line that says what is trained."""
        p, data = self.preset, "scikit-learn's digits" if self.data is None else f"Omniglot ({self.data})"
        learned = "" if p.per is None else f", learned per {p.per}"
        return (
            f"{data}: {self.ways} ways, {self.shots} shots, {p.queries} queries a class, {p.meta_batch} tasks, "
            f"{p.steps} inner step(s) at {p.inner_lr:g}{learned}"
        )

    def config(self) -> dict[str, Any]:
        """What must be equal where a checkpoint is continued."""
        config = {"experiment": "digits" if self.data is None else "omniglot"} | asdict(self.preset)
        config |= {name: getattr(self, name) for name in ("ways", "shots", "validation", "seed", "plain")}
        # the cosine's shape depends on the whole length
        return config | ({"minutes": self.minutes, "iterations": self.iterations} if self.preset.cosine else {})


class OmniglotRun:
    """Training, test, picture and comparison, in the order in which `mtml train omniglot` does them.

    Raises:
        DataError: where data are missing, broken, or too few for the tasks asked; before anything is trained.
    """

    def __init__(self, settings: OmniglotSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.train_images, self.log_images, self.test_images = self._images()
        self.tasks = Prefetch(self.stream(TRAIN))
        self.test = self._episodes(self.test_images, TEST)
        self.logged = self._episodes(self.log_images, LOGGED)
        preset, pixels = settings.preset, self.train_images.shape[2]
        hidden = DIGIT_HIDDEN if settings.data is None else HIDDEN
        model = mlp((pixels, *hidden, settings.ways), init=preset.init, seed=settings.seed)
        self.maml: mtml.MAML = make_maml(
            model,
            lr=preset.inner_lr,
            steps=preset.steps,
            loss="cross_entropy",
            per=preset.per,
            backend=settings.backend,
        )
        optimizer = torch.optim.Adam if settings.plain else FlatAdam
        self.optimizer: Any = optimizer(self.maml.parameters(), lr=preset.outer_lr)

    def _images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those to train on, to look at while training, and to test on."""
        if self.settings.data is None:
            digits = load_digits()
            return digits.train, digits.test, digits.test
        split = split_omniglot(self.settings.data, validation=self.settings.validation)
        return split.train, split.validation if self.settings.validation else split.test, split.test

    @property
    def _source(self) -> str:
        return "scikit-learn's digits" if self.settings.data is None else str(self.settings.data)

    def stream(self, number: int) -> ImageEpisodes:
        """A stream of training tasks."""
        s, p = self.settings, self.settings.preset
        return ImageEpisodes(
            self.train_images,
            s.ways,
            s.shots,
            p.queries,
            p.meta_batch,
            s.seed,
            shift=p.shift,
            stream=number,
            source=f"{self._source} (training classes)",
        )

    def _episodes(self, images: np.ndarray, stream: int) -> ImageEpisodes:
        """Tasks to be judged by, with as many queries as the drawings allow, up to 15 a class."""
        s = self.settings
        queries = max(1, min(TEST_QUERIES, images.shape[1] - s.shots))
        source = f"{self._source} (test classes)"
        return ImageEpisodes(images, s.ways, s.shots, queries, CHUNK, s.seed, stream=stream, source=source)

    def _accuracy(self, episodes: ImageEpisodes, tasks: int, steps: int) -> Estimate:
        """Over `tasks` tasks, always the same ones."""
        parts = [accuracies(self.maml, episodes.batch(i), steps) for i in range(math.ceil(tasks / CHUNK))]
        return estimate(torch.cat(parts)[:tasks])

    def _logged_accuracy(self) -> dict[str, float]:
        accuracy = self._accuracy(self.logged, LOG_TASKS, self.settings.preset.steps)
        return {"accuracy": accuracy.mean, "ci95": accuracy.ci95}

    def _schedule(self, used: float) -> None:
        """Cosine decay of the outer rate to nothing over the budget."""
        lr = self.settings.preset.outer_lr * 0.5 * (1.0 + math.cos(math.pi * used))
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer.param_groups[0]["lr"] = lr
        else:
            self.optimizer.lr = lr

    def train(self, resume: bool = False) -> Progress:
        """Train by the settings; raises as `Loop.run`."""
        if self.settings.plain:
            step = plain_step(self.maml, self.optimizer, self.tasks, "cross_entropy")
        else:
            step = engine_step(self.maml, self.optimizer, self.tasks)
        loop = Loop(
            step=step,
            parts={"model": self.maml, "optimizer": self.optimizer, "tasks": self.tasks},
            budget=self.settings.budget,
            folder=self.folder,
            config=self.settings.config(),
            columns=("accuracy", "ci95"),
            evaluate=self._logged_accuracy,
            evaluate_seconds=5.0 if self.settings.data is None else 20.0,
            schedule=self._schedule if self.settings.preset.cosine else None,
            log_every=5 if self.settings.plain else 50,
        )
        with self.tasks:
            return loop.run(resume=resume)

    def test_accuracy(self, tasks: int = TEST_TASKS) -> list[Estimate]:
        """Accuracy on tasks of unseen classes before adaptation and after each step."""
        return [self._accuracy(self.test, tasks, k) for k in range(self.settings.preset.test_steps + 1)]

    @torch.no_grad()
    def shown(self) -> ImageTask:
        """One test task and what the network makes of it before and after adaptation."""
        s = self.settings
        batch = ImageEpisodes(self.test_images, s.ways, s.shots, 1, 1, s.seed, stream=SHOWN).batch(0)
        side = round(self.test_images.shape[2] ** 0.5)
        before, after = (
            self.maml.meta_forward(batch, steps=k).output[0].argmax(-1).numpy() for k in (0, s.preset.test_steps)
        )
        support = batch.sx[0].reshape(s.ways, s.shots, side, side)[:, 0]
        return ImageTask(support.numpy(), batch.qx[0].reshape(s.ways, side, side).numpy(), before, after)

    def plot(self, accuracy: list[Estimate]) -> Path:
        """Draw omniglot.png (digits.png)."""
        name = "digits.png" if self.settings.data is None else "omniglot.png"
        log, steps = self.folder / "log.csv", self.settings.preset.steps
        return plot_images(log, accuracy, self.shown(), steps, self.folder / name)

    def compare(self) -> Comparison:
        """The plain PyTorch loop beside the engine, on tasks of their own."""
        p = self.settings.preset
        return compare(
            self.maml,
            lambda: self.stream(COMPARED),
            loss="cross_entropy",
            lr=p.outer_lr,
            seconds=self.settings.plain_seconds,
        )

    def save_results(self, progress: Progress, accuracy: list[Estimate], comparison: Comparison | None) -> Path:
        """Write results.json."""
        results = {
            "settings": self.settings.config(),
            "iterations": progress.iteration,
            "seconds": progress.seconds,
            "accuracy": [value._asdict() for value in accuracy],
            "comparison": None if comparison is None else comparison._asdict(),
        }
        path = self.folder / "results.json"
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        return path


def table_text(accuracy: list[Estimate], settings: OmniglotSettings) -> str:
    """Accuracy by adaptation step."""
    data = "scikit-learn's digits, new drawings" if settings.data is None else "characters not seen in training"
    lines = [
        f"accuracy on {TEST_TASKS} tasks of {data}, {settings.ways} ways, {settings.shots} shots, with 95 % interval"
    ]
    for step, (mean, ci95) in enumerate(accuracy):
        when = "before adaptation" if step == 0 else f"after {step} step" + ("s" if step > 1 else "")
        lines.append(f"  {when:<18} {100 * mean:6.2f} ± {100 * ci95:.2f} %")
    if settings.data is not None and settings.ways == 5 and settings.shots in (1, 5):
        published = {1: 89.7, 5: 97.5}[settings.shots]
        lines.append(f"  (published for this network with BatchNorm, 60000 iterations: {published} %)")
    return "\n".join(lines)
