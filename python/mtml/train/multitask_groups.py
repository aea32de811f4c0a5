"""The groups of tasks of `mtml train multitask`: a stream of tasks, a trunk and a head each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import mtml
from mtml.multihead.heads import Head
from mtml.tasks.digits import load_digits
from mtml.tasks.errors import DataError
from mtml.tasks.generated import Languages, Regions
from mtml.tasks.image_episodes import ImageEpisodes
from mtml.tasks.sinusoids import Sinusoids
from mtml.tasks.stream import TaskStream
from mtml.tasks.task_batch import TaskBatch

__all__ = ["GROUPS", "TEST", "TRAIN", "GroupTasks", "Streams", "make_learner", "named"]

TRAIN, TEST = 0, 1  # independent streams of tasks under one seed
WIDTH = 64
WAYS, TOKENS, CLASSES = 5, 8, 3


class GroupTasks(NamedTuple):
    """One group: stream(tasks, seed, number) -> its tasks; trunk() -> features; its head; what its inner rate is beside
    that of the others, since a squared error of large values takes smaller steps than a cross-entropy."""

    stream: Callable[[int, int, int], TaskStream]
    trunk: Callable[[], nn.Module]
    head: Head
    rate: float = 1.0


def _digits(tasks: int, seed: int, number: int) -> TaskStream:
    """Five of scikit-learn's digits, three drawings of each to adapt on; new drawings in the test."""
    images = load_digits()
    chosen = images.train if number == TRAIN else images.test
    return ImageEpisodes(chosen, WAYS, 3, 3, tasks, seed, stream=number, source="digits")


def _sinusoid(tasks: int, seed: int, number: int) -> TaskStream:
    return Sinusoids(10, tasks=tasks, seed=seed, stream=number, block=64)


def _tokens(tasks: int, seed: int, number: int) -> TaskStream:
    return Languages(tasks=tasks, seed=seed, stream=number, vocabulary=TOKENS)


def _segmentation(tasks: int, seed: int, number: int) -> TaskStream:
    return Regions(tasks=tasks, seed=seed, stream=number, classes=CLASSES)


def _perceptron(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def _text() -> nn.Module:
    return nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def _image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())


GROUPS: dict[str, GroupTasks] = {
    "digits": GroupTasks(_digits, lambda: _perceptron(64), mtml.Classification(WAYS)),
    "sinusoid": GroupTasks(_sinusoid, lambda: _perceptron(1), mtml.Regression(1), 0.1),
    "tokens": GroupTasks(_tokens, _text, mtml.Tokens(TOKENS)),
    "segmentation": GroupTasks(_segmentation, _image, mtml.Segmentation(CLASSES)),
}


def named(names: str) -> tuple[str, ...]:
    """The groups of a list with commas. Raises DataError for another name, or none."""
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found or ("",):
        if name not in GROUPS:
            raise DataError(f"groups: expected some of {','.join(GROUPS)}, got {name!r}")
    return found


def make_learner(names: tuple[str, ...], lr: float, seed: int, **options: Any) -> mtml.MultiTaskMAML:
    """The learner of these groups; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunks = {name: GROUPS[name].trunk() for name in names}
        rates = {name: lr * GROUPS[name].rate for name in names}
        return mtml.MultiTaskMAML(trunks, {name: GROUPS[name].head for name in names}, rates, **options)


class Streams:
    """Meta-batches of several groups at once: {group: TaskBatch}, endless, at one position."""

    def __init__(self, names: tuple[str, ...], tasks: int, seed: int, number: int) -> None:
        self.of = {name: GROUPS[name].stream(tasks, seed, number) for name in names}

    def __next__(self) -> dict[str, TaskBatch]:
        return {name: next(stream) for name, stream in self.of.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: stream.state_dict() for name, stream in self.of.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, stream in self.of.items():
            stream.load_state_dict(state[name])
