"""Prototypical networks (Snell, Swersky, Zemel, 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["get_num_samples", "get_prototypes", "prototypical_loss"]


def get_num_samples(targets: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """How many samples each class has: [T, C] from class ids [T, N]; in the dtype of the targets by default."""
    ones = torch.ones_like(targets, dtype=dtype)
    return ones.new_zeros(len(targets), num_classes).scatter_add_(1, targets, ones)


def get_prototypes(embeddings: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The mean embedding of every class, [T, C, D], from embeddings [T, N, D] and class ids [T, N]; 0 for an empty one.

    Example:
        >>> import torch
        >>> get_prototypes(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 1]]), 2).flatten().tolist()
        [2.0, 5.0]
    """
    counts = get_num_samples(targets, num_classes, dtype=embeddings.dtype).clamp_(min=1)
    sums = embeddings.new_zeros(len(embeddings), num_classes, embeddings.shape[-1])
    sums = sums.scatter_add(1, targets.unsqueeze(-1).expand_as(embeddings), embeddings)
    return sums / counts.unsqueeze(-1)


def prototypical_loss(prototypes: Tensor, embeddings: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    """Cross-entropy of the softmax of minus squared distances from queries [T, N, D] to prototypes [T, C, D].

    Args:
        targets: class ids [T, N].
        kwargs: of `torch.nn.functional.cross_entropy`.
    """
    distances = (prototypes.unsqueeze(2) - embeddings.unsqueeze(1)).square().sum(-1)  # [T, C, N]
    return F.cross_entropy(-distances, targets, **kwargs)
