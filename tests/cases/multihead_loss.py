"""Random heads of every kind, and a call's losses and gradients."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels import HeadLoss, multihead_loss
from mtml_kernels.losses import LOSSES
from mtml_kernels.schema.losses import CLASS_KINDS, rows_shape
from mtml_kernels.schema.losses import HEAD_KINDS as KINDS

OPTIONS = ("sample_weights", "class_weights", "pos_weights")


@dataclasses.dataclass
class Head:
    """One head's tensors."""

    spec: HeadLoss
    logits: Tensor
    target: Tensor
    sample_weights: Tensor | None = None
    class_weights: Tensor | None = None
    pos_weights: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        moved = {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
        return dataclasses.replace(self, **moved)


def _shape(rng: random.Random, kind: str, class_dim: int) -> tuple[int, ...]:
    n, c = rng.choice([0, 1, 2, 5, 17, 33]), rng.choice([1, 2, 3, 7, 10, 16, 17, 33, 65, 130])
    if LOSSES[kind].outputs == 2:
        return rng.choice([(n, 2 * c), (n, 3, 2 * c)])
    if kind in CLASS_KINDS and class_dim == -1:
        return rng.choice([(n, c), (n, 3, c)])
    return rng.choice([(n, c), (n, c), (n, c, 5), (n, c, 3, 7), (n, c, 300)])


def random_head(seed: int, kind: str = "", shape: tuple[int, ...] | None = None) -> Head:
    """A head of any kind, shape (even in the last dimension, where it is given) and options, in float64."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kind = kind or rng.choice(KINDS)
    class_dim = rng.choice([1, -1])
    shape = shape or _shape(rng, kind, class_dim)
    ce = kind == "cross_entropy"
    spec = HeadLoss(
        kind,
        rng.choice(["mean", "sum"]),
        ignore_index=rng.choice([-100, 0]),
        label_smoothing=rng.choice([0.0, 0.0, 0.3, 1.0]) if ce else 0.0,
        delta=rng.choice([1.0, 0.4]),
        class_dim=class_dim,
    )

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=g, dtype=torch.float64)

    logits = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    rows = rows_shape(spec, logits)
    if ce and rng.random() < 0.7:
        target = torch.randint(0, shape[class_dim], tuple(rows), generator=g)
        target = torch.where(draw(*rows) < 0.2, spec.ignore_index, target)
    elif kind in CLASS_KINDS:
        target = torch.softmax(3 * draw(*shape), class_dim) * (draw(*shape) > 0.1)
    else:
        target = draw(*shape[:-1], shape[-1] // 2) if LOSSES[kind].outputs == 2 else draw(*shape)
    head = Head(spec, logits, target)
    if rng.random() < 0.5:
        head.sample_weights = draw(*(rows if rng.random() < 0.5 else rows[:1])).round(decimals=1)
    if ce and rng.random() < 0.5:
        head.class_weights = draw(shape[class_dim])
    if kind == "bce_with_logits" and rng.random() < 0.5:
        head.pos_weights = 3 * draw(*shape[1:])
    return head


def arguments(heads: Sequence[Head]) -> tuple[list[Tensor], list[HeadLoss], dict[str, Any]]:
    """Targets, kinds and options of a call."""
    options = {name: [getattr(h, name) for h in heads] for name in OPTIONS}
    return [h.target for h in heads], [h.spec for h in heads], options


def evaluate(heads: Sequence[Head], backend: str, cotangent: Tensor | None = None) -> list[Tensor]:
    """The losses, then every head's gradient (of the losses' sum, or with a cotangent [H])."""
    logits = [h.logits.detach().clone().requires_grad_() for h in heads]
    targets, kinds, options = arguments(heads)
    losses = multihead_loss(logits, targets, kinds, backend=backend, **options)
    total = losses.sum() if cotangent is None else (losses * cotangent).sum()
    return [losses.detach(), *torch.autograd.grad(total, logits)]


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest element (at least 1e-2)."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-2)))
    return worst
