"""Prototypical networks' classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PrototypicalClassifier", "compute_prototypes"]

EPS = 1e-8


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class's rows: support [N, ...], labels [N] -> [C, ...], classes in ascending order."""
    classes, index = torch.unique(labels, return_inverse=True)
    sums = support.new_zeros(len(classes), *support.shape[1:]).index_add(0, index, support)
    counts = torch.bincount(index, minlength=len(classes)).to(support.dtype)
    return sums / counts.reshape(-1, *(1 for _ in support.shape[1:]))


class PrototypicalClassifier(nn.Module):
    """Logits by the distance to the mean of each class's support.

    Args:
        support, labels: [N, D] and [N], to fit at once.
        distance: "euclidean" (its square), "cosine" (of normalised rows), or a callable(prototypes, queries) -> [M, C].
        normalize: scale rows to length 1 first.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.nn import PrototypicalClassifier
        >>> classifier = PrototypicalClassifier(torch.eye(3), torch.arange(3))
        >>> classifier(torch.eye(3)).argmax(1)
        tensor([0, 1, 2])

    Paper: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", 2017.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        named = {"euclidean": self.euclidean_distance, "cosine": self.cosine_distance}
        if isinstance(distance, str) and distance not in named:
            raise ValueError(f"distance: expected 'euclidean', 'cosine' or a callable, got {distance!r}")
        self.distance: Any = named[distance] if isinstance(distance, str) else distance
        self.normalized = normalize or distance == "cosine"
        self.prototypes: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Compute the prototypes [C, D], which are kept and returned."""
        prototypes = compute_prototypes(support, labels)
        self.prototypes = self.normalize(prototypes) if self.normalized else prototypes
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Of rows of length 1: [C, D], [M, D] -> [M, C]."""
        return -queries @ prototypes.t()

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Squared: [C, D], [M, D] -> [M, C]."""
        return (prototypes.unsqueeze(0) - queries.unsqueeze(1)).square().sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPS) -> Tensor:
        """Rows of length 1."""
        return x / (x.norm(dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [M, C] of queries [M, D]. Raises RuntimeError before `fit_`."""
        if self.prototypes is None:
            raise RuntimeError("prototypes: there are none yet; call fit_(support, labels) first")
        found: Tensor = -self.distance(self.prototypes, self.normalize(x) if self.normalized else x)
        return found
