"""Four kinds of tasks on two trunks: what ``python -m bench multitask`` measures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mtml
from mtml.multihead.heads import Head

__all__ = ["HEADS", "LR", "STEPS", "make_batches", "make_model"]

STEPS, LR = 5, 0.1
WIDTH, PIXELS, VOCABULARY, LENGTH = 64, 64, 16, 8
HEADS: dict[str, Head] = {
    "class": mtml.Classification(5),
    "value": mtml.Regression(3),
    "label": mtml.MultiLabel(8),
    "token": mtml.Tokens(VOCABULARY),
}


def make_model(dtype: torch.dtype) -> mtml.MultiTaskMAML:
    """A perceptron for three groups, and an embedding with a perceptron for tokens."""
    torch.manual_seed(0)
    vectors = nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, WIDTH), nn.ReLU())
    tokens = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    trunks = {"class": vectors, "value": vectors, "label": vectors, "token": tokens}
    return mtml.MultiTaskMAML(trunks, HEADS, LR, steps=STEPS).to(dtype)


def make_batches(tasks: int, dtype: torch.dtype) -> dict[str, mtml.TaskBatch]:
    """`tasks` tasks of every kind, of unequal sizes: 8 to 25 samples to adapt on, as many to judge by."""
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def ids(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    def vectors(samples: int) -> Tensor:
        return values(tasks, samples, PIXELS)

    def batch(x: list[Tensor], y: list[Tensor]) -> mtml.TaskBatch:
        return mtml.TaskBatch(x[0], y[0], x[1], y[1])

    def twice(*shape: int) -> list[Tensor]:
        return [ids(VOCABULARY, tasks, *shape) for _ in range(2)]

    return {
        "class": batch([vectors(25), vectors(25)], [ids(5, tasks, 25), ids(5, tasks, 25)]),
        "value": batch([vectors(10), vectors(10)], [values(tasks, 10, 3), values(tasks, 10, 3)]),
        "label": batch([vectors(16), vectors(16)], [values(tasks, 16, 8).sigmoid(), values(tasks, 16, 8).sigmoid()]),
        "token": batch(twice(8, LENGTH), twice(8, LENGTH)),
    }
