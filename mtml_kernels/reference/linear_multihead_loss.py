"""`linear_multihead_loss` in plain PyTorch: the losses of `multihead_loss` of linear heads' logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.reference.multihead_loss import multihead_loss
from mtml_kernels.schema.linear_multihead_loss import LinearHead

__all__ = ["linear_multihead_loss"]


def linear_multihead_loss(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: Sequence[LinearHead],
) -> Tensor:
    """The losses [H]: z_h = features_h weights_h^T + biases_h, and of it the loss of `heads[h]` at its target.

    Args:
        features: [N, D] for each head. weights: [C, D], biases: [C] or None; they stand for those of `heads`.
        heads: losses, targets, sample, class and pos weights.
    """
    logits = [F.linear(x, w, b) for x, w, b in zip(features, weights, biases, strict=True)]
    return multihead_loss(
        logits,
        [h.target for h in heads],
        [h.spec for h in heads],
        [h.sample_weights for h in heads],
        [h.class_weights for h in heads],
        [h.pos_weights for h in heads],
    )
