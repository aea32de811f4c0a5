"""ANIL for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtml.compat.learn2learn.algorithms.lightning.episodic import LightningEpisodicModule, split_episode
from mtml.compat.learn2learn.algorithms.lightning.maml import LightningMAML, adapted_loss
from mtml.compat.learn2learn.algorithms.maml import MAML
from mtml_kernels.functional.hvp import recordable

__all__ = ["LightningANIL"]


class LightningANIL(LightningEpisodicModule):
    """Features that all tasks share, and a classifier adapted to each; each batch is one task.

    Args:
        features: run once, on support and queries together.
        classifier: what is adapted.
        loss, options: as of `LightningMAML`.
    """

    adaptation_steps: int = LightningMAML.adaptation_steps
    adaptation_lr: float = LightningMAML.adaptation_lr
    OPTIONS = LightningMAML.OPTIONS

    def __init__(
        self, features: nn.Module, classifier: nn.Module, loss: Callable[..., Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._take(options)
        self._same_ways()
        self.features = nn.DataParallel(features) if self.data_parallel else features
        self.classifier = MAML(classifier, lr=self.adaptation_lr)

    @torch.inference_mode(False)  # validation and tests adapt too
    @torch.enable_grad()
    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        self.features.train()
        learner = self.classifier.clone()
        learner.train()
        data, labels = recordable(batch)
        episode = split_episode((self.features(data), labels), ways, shots, queries)
        return adapted_loss(learner, self.loss, episode, self.adaptation_steps)
