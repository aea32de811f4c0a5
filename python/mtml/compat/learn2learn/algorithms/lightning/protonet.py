"""Prototypical networks for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mtml.compat.learn2learn.algorithms.lightning.episodic import LightningEpisodicModule, split_episode
from mtml.compat.learn2learn.nn import PrototypicalClassifier
from mtml.compat.learn2learn.utils import accuracy

__all__ = ["LightningPrototypicalNetworks"]


class LightningPrototypicalNetworks(LightningEpisodicModule):
    """Features, and a `PrototypicalClassifier` fitted to each task; each batch is one task, in any order of classes.

    Args:
        features: [N, ...] -> [N, D].
        loss: of predictions and labels; None for cross-entropy.
        options: as of `LightningEpisodicModule`, and distance_metric; data_parallel.
    """

    distance_metric: str = "euclidean"
    OPTIONS = (*LightningEpisodicModule.OPTIONS, "distance_metric")

    def __init__(self, features: nn.Module, loss: Callable[..., Tensor] | None = None, **options: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._take(options)
        self.features = nn.DataParallel(features) if self.data_parallel else features
        self.classifier = PrototypicalClassifier(distance=self.distance_metric)

    def meta_learn(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        self.features.train()
        data, labels = batch
        labels, order = labels.squeeze(0).sort()
        data = data.squeeze(0)[order]
        sx, sy, qx, qy = split_episode((self.features(data), labels), ways, shots, queries)
        self.classifier.fit_(sx, sy)
        logits = self.classifier(qx)
        return self.loss(logits, qy), accuracy(logits, qy)
