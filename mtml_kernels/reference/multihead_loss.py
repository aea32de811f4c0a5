"""The losses of several heads, as the mathematics reads; differentiable any number of times.

For softmax kinds a row is what has one class (a sample, a pixel, a token); else it is a sample. With row losses l_i and
row weights s_i (1 where none are given):
    mean   sum s_i l_i / sum s_i v_i,     0 where the denominator is 0          sum   sum s_i l_i
where v_i is the class weight of row i's id (1 without class weights, and where the target is probabilities; 0 for an
ignored id). l_i is, with p = softmax(z), class weights c, smoothing e over C classes:
    cross_entropy    (1 - e) c_y (-log p_y) + e / C sum_j c_j (-log p_j)        or   sum_j c_j t'_j (-log p_j)
    kl               sum_j t_j (log t_j - log p_j)                              0 log 0 = 0
    others           the mean over the elements of the sample ("sum": their sum)
with t' = (1 - e) t + e / C. gaussian_nll, an element with mean m and log variance w: (w + (y - m)^2 exp(-w)) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtml_kernels.schema.losses import HeadLoss, log_softmax, rows_shape

__all__ = ["head_loss", "multihead_loss"]

Optional = Sequence[Tensor | None] | None


def multihead_loss(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[HeadLoss],
    sample_weights: Optional = None,
    class_weights: Optional = None,
    pos_weights: Optional = None,
) -> Tensor:
    """The loss of every head, [H]. Arguments as in `head_loss`, one entry a head."""
    none: list[Tensor | None] = [None] * len(logits)
    columns = (logits, targets, kinds, sample_weights or none, class_weights or none, pos_weights or none)
    losses = [head_loss(*head) for head in zip(*columns, strict=True)]
    return torch.stack(losses) if losses else torch.zeros(0)


def head_loss(
    logits: Tensor,
    target: Tensor,
    spec: HeadLoss,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The loss of one head.

    Args:
        logits, target: see `HeadLoss`.
        sample_weights: [N], or one a row ([N, ...] without the classes) for softmax kinds.
        class_weights: [C], cross_entropy only. pos_weight: broadcast to a sample's shape, bce_with_logits only.

    Returns:
        A scalar.
    """
    if spec.info.classes:
        losses, counts = _softmax_rows(logits, target, spec, class_weights)
    else:
        losses = _element_rows(logits, target, spec, pos_weight)
        counts = torch.ones_like(losses)
    weights = torch.ones_like(losses)
    if sample_weights is not None:
        own = sample_weights.to(losses.dtype)
        weights = own.reshape(*own.shape, *(1,) * (losses.ndim - own.ndim)).expand_as(losses)
    # a row of weight 0 adds nothing, even if its loss is infinite
    total = torch.where(weights == 0, torch.zeros_like(losses), weights * losses).sum()
    if spec.reduction == "sum":
        return total
    norm = (weights * counts).sum()
    empty = norm == 0
    return torch.where(empty, torch.zeros_like(total), total / torch.where(empty, torch.ones_like(norm), norm))


def _softmax_rows(
    logits: Tensor, target: Tensor, spec: HeadLoss, class_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of every row and what it counts, both of `rows_shape`."""
    z = logits.movedim(spec.class_dim, -1)  # [..., C]
    if not spec.info.ids:
        return spec.info.formula(z, target.movedim(spec.class_dim, -1), spec.p0), torch.ones_like(z[..., 0])
    log_p = log_softmax(z)
    classes = z.shape[-1]
    c = torch.ones(classes, dtype=z.dtype, device=z.device) if class_weights is None else class_weights.to(z.dtype)
    e = spec.label_smoothing
    if target.is_floating_point():
        t = (1 - e) * target.movedim(spec.class_dim, -1) + e / max(classes, 1)
        return -(c * t * log_p).sum(-1), torch.ones_like(z[..., 0])
    assert target.shape == torch.Size(rows_shape(spec, logits))
    counted = target != spec.ignore_index
    y = target.where(counted, torch.zeros_like(target))
    own = c[y]  # [...]
    losses = -(1 - e) * own * log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    if e:
        losses = losses - e / classes * (c * log_p).sum(-1)
    return torch.where(counted, losses, torch.zeros_like(losses)), own * counted


def _element_rows(logits: Tensor, target: Tensor, spec: HeadLoss, pos_weight: Tensor | None) -> Tensor:
    """Loss of every sample, [N]."""
    extra = {"pos_weight": pos_weight} if spec.info.weights == "pos_weights" else {}
    each = spec.info.formula(logits, target, spec.p0, **extra)
    rows = each.reshape(each.shape[0], math.prod(each.shape[1:])).sum(-1)
    return rows if spec.reduction == "sum" else rows / max(math.prod(each.shape[1:]), 1)
