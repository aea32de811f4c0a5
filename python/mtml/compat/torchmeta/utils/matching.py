"""Matching networks (Vinyals et al., 2016, arXiv 1606.04080)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["matching_log_probas", "matching_loss", "matching_probas", "pairwise_cosine_similarity"]


def pairwise_cosine_similarity(embeddings1: Tensor, embeddings2: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines [T, N, M] between the rows of [T, N, D] and of [T, M, D]; the product of norms is at least `eps`.

    Example:
        >>> import torch
        >>> pairwise_cosine_similarity(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])).tolist()
        [[[1.0, 0.0]]]
    """
    squared = embeddings1.square().sum(2).unsqueeze(2) * embeddings2.square().sum(2).unsqueeze(1)
    return torch.bmm(embeddings1, embeddings2.mT) * squared.clamp(min=eps * eps).rsqrt()


def matching_log_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    """Log-probabilities [T, C, M] of test samples: their attention to the samples of each class.

    Args:
        embeddings: [T, N, D], with class ids `targets` [T, N].
        test_embeddings: [T, M, D].
        eps: as of `pairwise_cosine_similarity`.
    """
    cosines = pairwise_cosine_similarity(embeddings, test_embeddings, eps=eps)  # [T, N, M]
    highest = cosines.detach().amax(1, keepdim=True)
    weights = (cosines - highest).exp()
    sums = weights.new_zeros(len(weights), num_classes, weights.shape[2])
    sums = sums.scatter_add(1, targets.unsqueeze(-1).expand_as(weights), weights)
    return sums.log() + highest - cosines.logsumexp(1, keepdim=True)


def matching_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    """Probabilities [T, C, M]: see `matching_log_probas`."""
    return matching_log_probas(embeddings, targets, test_embeddings, num_classes, eps=eps).exp()


def matching_loss(
    train_embeddings: Tensor,
    train_targets: Tensor,
    test_embeddings: Tensor,
    test_targets: Tensor,
    num_classes: int,
    eps: float = 1e-8,
    **kwargs: Any,
) -> Tensor:
    """Negative log-likelihood of the test targets [T, M] under `matching_log_probas`.

    Args:
        kwargs: of `torch.nn.functional.nll_loss`.
    """
    found = matching_log_probas(train_embeddings, train_targets, test_embeddings, num_classes, eps=eps)
    return F.nll_loss(found, test_targets, **kwargs)
