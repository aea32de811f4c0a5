"""What else of PyTorch has no second derivative, or a wrong one, by formulas that are differentiable at will.

Each function has the signature of the one that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FUNCTIONS", "LAYERS"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The flash and memory-efficient kernels have no second derivative."""
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("scaled_dot_product_attention: expected attn_mask or is_causal=True, got both")
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        keep = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if keep else scores + attn_mask
        idle = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key gets zeros
        weights = scores.masked_fill(idle, 0.0).softmax(-1).masked_fill(idle, 0.0)
    return F.dropout(weights, dropout_p) @ value if dropout_p > 0 else weights @ value


def hardsigmoid(input: Tensor) -> Tensor:
    """F.hardsigmoid: relu6(x + 3) / 6."""
    return F.hardtanh(input + 3.0, 0.0, 6.0) / 6.0


def hardsigmoid_(input: Tensor) -> Tensor:
    """F.hardsigmoid in place."""
    return input.copy_(hardsigmoid(input))


def _norm(difference: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension, with derivatives 0 at 0, as PyTorch's first one is."""
    size = difference.abs()
    if math.isinf(p):
        return size.amax(-1)
    if p == 0:
        return size.sign().sum(-1)
    if p == 1:
        return size.sum(-1)
    zero = size == 0
    total = size.masked_fill(zero, 1.0).pow(p).masked_fill(zero, 0.0).sum(-1)
    nothing = total == 0
    return total.masked_fill(nothing, 1.0).pow(1 / p).masked_fill(nothing, 0.0)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """torch.cdist: the p-norms [..., P, R] of all differences of x1 [..., P, M] and x2 [..., R, M]."""
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """F.pdist: the p-norms of the differences of all pairs of rows [N, M]."""
    first, second = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _bags(input: Tensor, offsets: Tensor, include_last_offset: bool) -> tuple[Tensor, int]:
    """The bag of every index [N], and how many bags there are."""
    count = offsets.shape[0] - int(include_last_offset)
    positions = torch.arange(input.shape[0], device=input.device)
    return torch.searchsorted(offsets[:count].contiguous(), positions.to(offsets.dtype), right=True) - 1, count


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """F.embedding_bag: sums, means or maxima of bags of rows."""
    if input.is_floating_point():  # a call of the old kind
        input, weight = weight, input
    if input.ndim == 2:
        bags, count = torch.arange(input.shape[0], device=input.device).repeat_interleave(input.shape[1]), len(input)
        input = input.flatten()
    else:
        assert offsets is not None
        bags, count = _bags(input, offsets, include_last_offset)
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)  # [N, E]
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
        rows, bags = rows[counted], bags[counted]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.flatten()[counted]
    if mode == "max":
        none = rows.new_zeros(rows.shape[1:])
        picked = (rows[bags == i] for i in range(count))
        return torch.stack([bag.max(0).values if len(bag) else none for bag in picked])
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten().unsqueeze(-1)
    total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return total
    sizes = torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add(0, bags, torch.ones_like(rows[:, 0]))
    return total / sizes.clamp(min=1).unsqueeze(-1)


def _reduced(each: Tensor, reduction: int) -> Tensor:
    """PyTorch's codes of reductions: 0 none, 1 mean, 2 sum."""
    return each if reduction == 0 else each.mean() if reduction == 1 else each.sum()


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """torch._C._nn.multi_margin_loss: the mean over classes of relu(margin - x_y + x_i)^p for i != y."""
    rows, ids = (input, target.reshape(-1)) if input.ndim == 2 else (input.reshape(1, -1), target.reshape(1))
    own = rows.gather(1, ids.unsqueeze(1))
    gaps = (margin - own + rows).relu()
    gaps = gaps if p == 1 else gaps.square()
    gaps = gaps if weight is None else gaps * weight[ids].unsqueeze(1)
    others = torch.arange(rows.shape[1], device=rows.device) != ids.unsqueeze(1)
    each = torch.where(others, gaps, 0.0).sum(1) / rows.shape[1]
    return _reduced(each if input.ndim == 2 else each[0], reduction)


def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """torch._C._nn.multilabel_margin_loss: the same for every label and every class that is none."""
    rows, ids = (input, target) if input.ndim == 2 else (input.reshape(1, -1), target.reshape(1, -1))
    given = (ids < 0).to(torch.long).cumsum(1) == 0  # labels count up to the first -1
    own = rows.gather(1, ids.clamp(min=0))  # [N, labels]
    classes = torch.arange(rows.shape[1], device=rows.device)
    labelled = ((ids.unsqueeze(2) == classes) & given.unsqueeze(2)).any(1)  # [N, C]
    gaps = (1 - own.unsqueeze(2) + rows.unsqueeze(1)).relu()  # [N, labels, C]
    each = torch.where(given.unsqueeze(2) & ~labelled.unsqueeze(1), gaps, 0.0).sum((1, 2)) / rows.shape[1]
    return _reduced(each if input.ndim == 2 else each[0], reduction)


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """In chunks, which `options` ask for, its second derivative is 0."""
    result: Tensor = F.linear_cross_entropy(*args, **kwargs)
    return result


LAYERS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "hardsigmoid": hardsigmoid,
    "hardsigmoid_": hardsigmoid_,
    "cdist": cdist,
    "pdist": pdist,
    "multi_margin_loss": multi_margin_loss,
    "multilabel_margin_loss": multilabel_margin_loss,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "embedding_bag": embedding_bag,
    "linear_cross_entropy": linear_cross_entropy,
}
