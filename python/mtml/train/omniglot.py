"""`mtml train omniglot`: few-shot classification of handwritten characters, from training to the published figures."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mtml
from mtml.tasks.files import atomic_write
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.prefetch import Prefetch
from mtml.train.adam import FlatAdam
from mtml.train.compare import Comparison, compare
from mtml.train.evaluate import Evaluation, accuracies, classify, estimate
from mtml.train.loop import Budget, Loop, Progress
from mtml.train.methods import engine_step, make_maml, plain_step
from mtml.train.metrics import PerClass, per_class
from mtml.train.models import adapted_names, conv4, mlp
from mtml.train.omniglot_data import load_images
from mtml.train.plots import ImageTask, plot_classes, plot_images, plot_tasks
from mtml.train.presets import Preset, step_weights
from mtml.train.published import published
from mtml.train.ranks import ALONE, Ranks

__all__ = ["MIN_TEST_TASKS", "OmniglotRun", "OmniglotSettings", "table_text"]

HIDDEN, FILTERS = (256, 128, 64, 64), 64
DIGIT_HIDDEN, DIGIT_FILTERS = (128, 64), 32
CHUNK, TEST_QUERIES, SHOWN_QUERIES = 50, 15, 2
MIN_TEST_TASKS = 600  # what the published figures are averaged over
TRAIN, LOGGED, TEST, SHOWN, COMPARED = range(5)  # independent streams of tasks under one seed


@dataclass(frozen=True)
class OmniglotSettings:
    """What defines a run; without `data` it takes scikit-learn's digits."""

    data: Path | None
    preset: Preset
    net: str = "mlp"
    split: str = "maml"
    ways: int = 5
    shots: int = 1
    minutes: float | None = None
    iterations: int | None = None
    validation: int = 0
    test_tasks: int = 1000
    log_tasks: int = 200
    seed: int = 0
    backend: str = "auto"
    plain: bool = False
    plain_seconds: float = 5.0

    @property
    def budget(self) -> Budget:
        """Where neither minutes nor iterations are given: one minute on the digits; on Omniglot the published number of
        iterations, 20 minutes for a preset without one."""
        if self.minutes is not None or self.iterations is not None:
            return Budget(self.iterations, self.minutes)
        if self.data is None:
            return Budget(minutes=1.0)
        return Budget(self.preset.iterations, None if self.preset.iterations else 20.0)

    @property
    def title(self) -> str:
        """One line that says what is trained."""
        p, data = self.preset, "scikit-learn's digits" if self.data is None else f"Omniglot ({self.data})"
        learned = "" if p.per is None else f", learned per {p.per}{' and step' if p.rates_per_step else ''}"
        return (
            f"{data}: {self.ways} ways, {self.shots} shots, {p.queries} queries a class, {p.meta_batch} tasks, "
            f"{p.steps} inner step(s) at {p.inner_lr:g}{learned}; {self.net}"
        )

    def config(self) -> dict[str, Any]:
        """What must be equal where a checkpoint is continued."""
        config = {"experiment": "digits" if self.data is None else "omniglot"} | asdict(self.preset)
        del config["iterations"]  # the preset's number, of which `budget` has made what it means
        del config["test_queries"]  # trains nothing
        names = ("net", "split", "ways", "shots", "validation", "seed", "plain")
        config |= {name: getattr(self, name) for name in names}
        # a schedule's shape depends on the whole length
        scheduled = self.preset.cosine or self.preset.multi_step > 0
        return config | (asdict(self.budget) if scheduled else {})


class OmniglotRun:
    """Training, test, pictures and comparison, in the order in which `mtml train omniglot` does them.

    Raises:
        DataError: where data are missing, broken, or too few for the tasks asked; before anything is trained.
    """

    def __init__(self, settings: OmniglotSettings, folder: Path, ranks: Ranks = ALONE) -> None:
        self.settings, self.folder, self.ranks = settings, folder, ranks
        preset = settings.preset
        self.images = load_images(settings.data, settings.split, settings.validation)
        side = self.images.side
        self.shape = (1, side, side) if settings.net == "conv4" else None
        self.tasks = Prefetch(self.stream(TRAIN))
        chunk = min(CHUNK, settings.test_tasks)
        self.test = self._episodes(self.images.test, TEST, tasks=chunk, queries=preset.test_queries or TEST_QUERIES)
        self.wide = self._episodes(self.images.test, TEST, tasks=chunk)
        self.logged = self._episodes(self.images.watched, LOGGED, tasks=min(CHUNK, settings.log_tasks))
        model = self._network()
        self.maml: mtml.MAML = make_maml(
            model,
            lr=preset.inner_lr,
            steps=preset.steps,
            loss="cross_entropy",
            per=preset.per,
            rates_per_step=preset.rates_per_step,
            params=adapted_names(model, preset.norm),
            batch_norm=preset.batch_norm,
            backend=settings.backend,
        )
        optimizer = torch.optim.Adam if settings.plain else FlatAdam
        self.optimizer: Any = optimizer(self.maml.parameters(), lr=preset.outer_lr)
        self._weights = step_weights(preset, 0.0)

    def _network(self) -> nn.Module:
        s, p, digits = self.settings, self.settings.preset, self.settings.data is None
        if s.net == "conv4":
            filters = DIGIT_FILTERS if digits else FILTERS
            return conv4(s.ways, side=self.images.side, filters=filters, init=p.init, norm=p.norm, seed=s.seed)
        sizes = (self.images.side**2, *(DIGIT_HIDDEN if digits else HIDDEN), s.ways)
        return mlp(sizes, init=p.init, norm=p.norm, seed=s.seed)

    @property
    def _source(self) -> str:
        return "scikit-learn's digits" if self.settings.data is None else str(self.settings.data)

    def stream(self, number: int) -> ImageEpisodes:
        """A stream of training tasks."""
        s, p = self.settings, self.settings.preset
        return ImageEpisodes(
            self.images.train,
            s.ways,
            s.shots,
            p.queries,
            p.meta_batch,
            s.seed,
            shift=p.shift,
            stream=number,
            shape=self.shape,
            source=f"{self._source} (training classes)",
        )

    def _episodes(self, images: np.ndarray, stream: int, *, tasks: int, queries: int = TEST_QUERIES) -> ImageEpisodes:
        """Tasks to be judged by, with as many queries a class as the drawings allow, up to `queries`."""
        s = self.settings
        queries = max(1, min(queries, images.shape[1] - s.shots))
        source = f"{self._source} (test classes)"
        return ImageEpisodes(
            images, s.ways, s.shots, queries, tasks, s.seed, stream=stream, shape=self.shape, source=source
        )

    def _logged_accuracy(self) -> dict[str, float]:
        """Over always the same tasks, after as many steps as in training."""
        steps = self.settings.preset.steps
        count = self.settings.log_tasks
        parts = [accuracies(self.maml, self.logged.batch(i), steps) for i in range(-(-count // self.logged.tasks))]
        found = estimate(torch.cat(parts)[:count])
        return {"accuracy": found.mean, "ci95": found.ci95}

    def _schedule(self, used: float) -> None:
        """Cosine decay of the outer rate over the budget, and the weights of the losses after each step."""
        p = self.settings.preset
        self._weights = step_weights(p, used)
        if not p.cosine:
            return
        lr = p.outer_floor + (p.outer_lr - p.outer_floor) * 0.5 * (1.0 + math.cos(math.pi * used))
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer.param_groups[0]["lr"] = lr
        else:
            self.optimizer.lr = lr

    def train(self, resume: bool = False) -> Progress:
        """Train by the settings; raises as `Loop.run`."""
        s, p = self.settings, self.settings.preset

        def weights() -> list[float] | None:
            return self._weights

        if s.plain:
            step = plain_step(self.maml, self.optimizer, self.tasks, "cross_entropy", weights, self.ranks)
        else:
            step = engine_step(self.maml, self.optimizer, self.tasks, weights, self.ranks)
        loop = Loop(
            step=step,
            parts={"model": self.maml, "optimizer": self.optimizer, "tasks": self.tasks},
            budget=s.budget,
            folder=self.folder,
            config=s.config(),
            columns=("accuracy", "ci95"),
            evaluate=self._logged_accuracy,
            evaluate_seconds=5.0 if s.data is None else 20.0,
            schedule=self._schedule if p.cosine or p.multi_step else None,
            log_every=5 if s.plain else 50,
            ranks=self.ranks,
        )
        with self.tasks:
            return loop.run(resume=resume)

    def evaluate(self) -> Evaluation:
        """Judge the network on tasks of unseen classes, before adaptation and after each step, as was published."""
        return classify(self.maml, self.test, self.settings.test_tasks, self.settings.preset.test_steps)

    def evaluate_wide(self) -> Evaluation | None:
        """The same with 15 queries a class, or as many as there are; None where `evaluate` had them already.

        A query set is normalised by its own statistics where the network has batch normalisation, so that the number of
        queries makes another test: here the harder one, whose query sets say less about their classes.
        """
        if self.wide.queries == self.test.queries:
            return None
        return classify(self.maml, self.wide, self.settings.test_tasks, self.settings.preset.test_steps)

    def per_class(self, found: Evaluation) -> PerClass:
        """Recall and F1 of every character tested on."""
        return per_class(found, self.images.names)

    @torch.no_grad()
    def shown(self) -> list[ImageTask]:
        """Test tasks and what the network makes of them before and after adaptation."""
        s, side = self.settings, self.images.side
        count = 6 if s.ways <= 10 else 3
        batch = self._episodes(self.images.test, SHOWN, tasks=count, queries=SHOWN_QUERIES).batch(0)
        before, after = (
            self.maml.meta_forward(batch, steps=k).output.argmax(-1).numpy() for k in (0, s.preset.test_steps)
        )
        support = batch.sx.reshape(count, s.ways, s.shots, side, side)[:, :, 0].numpy()
        query = batch.qx.reshape(count, -1, side, side).numpy()
        truth = batch.qy.numpy()
        return [ImageTask(support[t], query[t], truth[t], before[t], after[t]) for t in range(count)]

    def plot(self, found: Evaluation, classes: PerClass) -> list[Path]:
        """Draw omniglot.png (digits.png), tasks.png and characters.png."""
        name = "digits.png" if self.settings.data is None else "omniglot.png"
        tasks, steps = self.shown(), self.settings.preset.steps
        square = self.images.test.reshape(*self.images.test.shape[:2], self.images.side, self.images.side)
        return [
            plot_images(self.folder / "log.csv", found.accuracy, tasks, steps, self.folder / name),
            plot_tasks(tasks, self.settings.preset.test_steps, self.folder / "tasks.png"),
            plot_classes(classes, square, self.folder / "characters.png"),
        ]

    def compare(self) -> Comparison | None:
        """The plain PyTorch loop beside the engine, on tasks of their own; None for a run that was the plain loop."""
        s = self.settings
        if s.plain:
            return None
        return compare(
            self.maml,
            lambda: self.stream(COMPARED),
            loss="cross_entropy",
            lr=s.preset.outer_lr,
            seconds=s.plain_seconds,
        )

    def published(self) -> dict[str, float]:
        """What others report for this network and task; nothing for the digits or the other split."""
        s = self.settings
        return published(s.net, s.ways, s.shots) if s.data is not None and s.split == "maml" else {}

    def save_results(
        self,
        progress: Progress,
        found: Evaluation,
        wide: Evaluation | None,
        classes: PerClass,
        comparison: Comparison | None,
    ) -> Path:
        """Write results.json and characters.csv."""
        classes.write(self.folder / "characters.csv")
        results = {
            "settings": self.settings.config(),
            "iterations": progress.iteration,
            "seconds": progress.seconds,
            "test": {"tasks": found.tasks, "queries_per_class": self.test.queries, "classes": len(classes.names)},
            "accuracy": [value._asdict() for value in found.accuracy],
            "wide_test": None
            if wide is None
            else {
                "tasks": wide.tasks,
                "queries_per_class": self.wide.queries,
                "accuracy": [value._asdict() for value in wide.accuracy],
            },
            "macro_recall": classes.macro_recall,
            "macro_f1": classes.macro_f1,
            "published": self.published(),
            "comparison": None if comparison is None else comparison._asdict(),
            "environment": {
                "ranks": self.ranks.count,
                "threads": torch.get_num_threads(),
                "cpus": os.cpu_count(),
                "torch": str(torch.__version__),
            },
        }
        path = self.folder / "results.json"
        with atomic_write(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        return path


def table_text(run: OmniglotRun, found: Evaluation, wide: Evaluation | None, classes: PerClass) -> str:
    """Accuracy by adaptation step, the averages over characters, and what others have published."""
    s = run.settings
    data = "scikit-learn's digits, new drawings" if s.data is None else "characters not seen in training"
    tests = [(run.test.queries, found)] + ([] if wide is None else [(run.wide.queries, wide)])
    queries = " and ".join(f"{count} queries a class" for count, _ in tests)
    lines = [
        f"accuracy on {found.tasks} tasks of {data}, {s.ways} ways, {s.shots} shots, {queries}, with 95 % interval",
    ]
    for step in range(len(found.accuracy)):
        when = "before adaptation" if step == 0 else f"after {step} step" + ("s" if step > 1 else "")
        cells = [f"{100 * test.accuracy[step].mean:6.2f} ± {100 * test.accuracy[step].ci95:.2f} %" for _, test in tests]
        lines.append(f"  {when:<18} {'   '.join(cells)}")
    lines += [f"  {f'{name}, published':<28} {100 * value:6.2f} %" for name, value in run.published().items()]
    lines.append(
        f"macro average over {int((classes.tasks > 0).sum())} classes: "
        f"recall {100 * classes.macro_recall:.2f} %, F1 {100 * classes.macro_f1:.2f} %"
    )
    if found.tasks < MIN_TEST_TASKS:
        lines.append(f"(published figures are averages over at least {MIN_TEST_TASKS} tasks: raise --test-tasks)")
    if s.preset.norm != "none":
        lines.append("(a query set is normalised by its own batch statistics, as in the published experiments)")
    return "\n".join(lines)
