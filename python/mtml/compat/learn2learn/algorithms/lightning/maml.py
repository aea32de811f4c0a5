"""MAML for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtml.compat.learn2learn.algorithms.lightning.episodic import LightningEpisodicModule, split_episode
from mtml.compat.learn2learn.algorithms.maml import MAML
from mtml.compat.learn2learn.utils import accuracy
from mtml_kernels.functional.hvp import recordable

__all__ = ["LightningMAML", "adapted_loss"]


def adapted_loss(
    learner: MAML, loss: Callable[..., Tensor], episode: tuple[Tensor, ...], steps: int
) -> tuple[Tensor, Tensor]:
    """(loss, accuracy) on the queries after so many steps on the support set, which change the learner."""
    sx, sy, qx, qy = episode
    for _ in range(steps):
        learner.adapt(loss(learner(sx), sy))
    predictions = learner(qx)
    return loss(predictions, qy), accuracy(predictions, qy)


class LightningMAML(LightningEpisodicModule):
    """MAML of a model; each batch is one task, (data, labels) class after class.

    Args:
        model: what is adapted.
        loss: of predictions and labels; None for cross-entropy.
        options: as of `LightningEpisodicModule`, and adaptation_steps, adaptation_lr; data_parallel.
    """

    adaptation_steps: int = 1
    adaptation_lr: float = 0.1
    OPTIONS = (*LightningEpisodicModule.OPTIONS, "adaptation_steps", "adaptation_lr")

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._take(options)
        self._same_ways()
        self.model = MAML(model, lr=self.adaptation_lr)

    @torch.inference_mode(False)  # validation and tests adapt too
    @torch.enable_grad()
    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        learner = self.model.clone()
        learner.train()
        if self.data_parallel:
            learner.module = nn.DataParallel(learner.module)
        return adapted_loss(
            learner, self.loss, split_episode(recordable(batch), ways, shots, queries), self.adaptation_steps
        )
