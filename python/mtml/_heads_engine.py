"""The one place where `mtml` meets the multi-head losses of the engine.

Both functions take one entry a head and give the losses [H], differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.heads import HeadLoss
from mtml_kernels.reference.multihead_loss import multihead_loss as _losses

__all__ = ["linear_multihead_loss", "multihead_loss"]

Optional = Sequence[Tensor | None]


def multihead_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[HeadLoss],
    *,
    sample_weights: Optional,
    class_weights: Optional,
    pos_weights: Optional,
) -> Tensor:
    """The losses [H] of logits as `HeadLoss` says."""
    return _losses(logits, targets, kinds, sample_weights, class_weights, pos_weights)


def linear_multihead_loss(
    features: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Optional,
    targets: Sequence[Tensor],
    kinds: Sequence[HeadLoss],
    *,
    sample_weights: Optional,
    class_weights: Optional,
    pos_weights: Optional,
) -> Tensor:
    """The losses [H] of linear heads: features [N, D], shared, or [N_h, D_h] one a head; weights [C_h, D_h]."""
    own = [features] * len(weights) if isinstance(features, Tensor) else features
    logits = [F.linear(x, w, b) for x, w, b in zip(own, weights, biases, strict=True)]
    return _losses(logits, targets, kinds, sample_weights, class_weights, pos_weights)
