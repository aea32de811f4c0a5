"""Tasks of three kinds with something in common: what ``python -m bench transfer`` learns from and is tested on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mtml
from mtml.multihead.heads import Head

__all__ = ["HEADS", "Teachers", "make_trunk"]

INPUTS, HIDDEN, WIDTH = 8, 24, 64
HEADS: dict[str, Head] = {"class": mtml.Classification(4), "value": mtml.Regression(2), "label": mtml.MultiLabel(4)}


def make_trunk() -> nn.Module:
    """One for all groups."""
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


class Teachers:
    """Tasks y = W_t tanh(A x), W_t = sqrt(1 - own) W + sqrt(own) V_t, with A common to all groups, W to all tasks of a
    group, and V_t a task's own; `own` in [0, 1].

    So a model trained on all tasks together has A and W to learn, and is no straw man: the smaller `own`, the nearer it
    comes. Values are W_t tanh(A x); class ids the largest of them; labels their signs.
    """

    def __init__(self, seed: int, own: float) -> None:
        self.own = own
        self.common = torch.Generator().manual_seed(seed)
        self.features = self._normal(HIDDEN, INPUTS) / INPUTS**0.5 * 2
        self.mean = {name: self._normal(HIDDEN, head.outputs) for name, head in HEADS.items()}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.common)

    def batches(self, tasks: int, shots: int, queries: int) -> dict[str, mtml.TaskBatch]:
        """The next tasks of every group."""
        return {name: self._batch(name, tasks, shots, queries) for name in HEADS}

    def _batch(self, name: str, tasks: int, shots: int, queries: int) -> mtml.TaskBatch:
        own = self._normal(tasks, HIDDEN, HEADS[name].outputs)
        weight = (1 - self.own) ** 0.5 * self.mean[name] + self.own**0.5 * own
        x = self._normal(tasks, shots + queries, INPUTS)
        values = (x @ self.features.T).tanh() @ weight / HIDDEN**0.5 * 2
        y = {"class": values.argmax(-1), "label": (values > 0).to(values), "value": values}[name]
        return mtml.TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])
