"""One training step two ways: through the fused engine, and the plain-PyTorch way it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.distributed import MetaLoss, no_losses
from mtml.params import select
from mtml.tasks.task_batch import TaskBatch
from mtml.train.ranks import ALONE, Ranks
from mtml_kernels.batch_norm import step_rows

__all__ = ["engine_step", "inner_rates", "make_maml", "plain_losses", "plain_step"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def make_maml(
    model: nn.Module,
    *,
    lr: float,
    steps: int,
    loss: str,
    per: str | None = None,
    rates_per_step: bool = False,
    params: Sequence[str] | None = None,
    batch_norm: str = "module",
    backend: str = "auto",
) -> mtml.MAML:
    """The learner; `per` ("all", "tensor", "element") makes its inner rates learnable (per element: Meta-SGD), with
    `rates_per_step` separately for every step (per tensor: MAML++)."""
    rates: Any = lr
    if per is not None:
        rates = mtml.InnerLR(model, lr, per=per, steps=steps if rates_per_step else None, params=params)
    return mtml.MAML(model, lr=rates, steps=steps, loss=loss, params=params, batch_norm=batch_norm, backend=backend)


Weights = Callable[[], Sequence[float] | None]


def _last_alone() -> None:
    return None


def engine_step(
    maml: mtml.MAML, optimizer: Any, stream: Iterator[TaskBatch], weights: Weights = _last_alone, ranks: Ranks = ALONE
) -> Callable[[], Tensor]:
    """A function that trains on the next meta-batch and returns its losses [T]; of several ranks, those of its share.

    `weights` is asked before each for the weights of the losses after each step, None for the last alone.
    """
    meta: Callable[..., Tensor] = maml.meta_loss if ranks.count == 1 else MetaLoss(maml)

    def losses_of(share: TaskBatch) -> Tensor:
        return meta(share, step_weights=weights())

    return _step(losses_of, maml, optimizer, stream, ranks)


def _step(
    losses_of: Callable[[TaskBatch], Tensor], maml: mtml.MAML, optimizer: Any, stream: Iterator[TaskBatch], ranks: Ranks
) -> Callable[[], Tensor]:
    """One update by the mean of the losses [t] of every rank's share of the next meta-batch."""
    params = list(maml.parameters())

    def step() -> Tensor:
        batch = next(stream)
        losses = losses_of(ranks.share(batch))
        optimizer.zero_grad()
        ranks.loss(losses, batch.tasks).backward()
        ranks.average(params)
        optimizer.step()
        return losses.detach()

    return step


def inner_rates(maml: mtml.MAML) -> dict[str, Tensor | float]:
    """The learner's inner rate for every tensor it adapts, by name."""
    rates: Any = maml.lr.as_dict() if isinstance(maml.lr, mtml.InnerLR) else maml.lr
    names = select(maml.module, maml.params)
    return {name: rates[name] if isinstance(rates, Mapping) else rates for name in names}


def plain_losses(
    model: nn.Module,
    batch: TaskBatch,
    *,
    rates: Mapping[str, Tensor | float],
    steps: int,
    loss: str,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """MAML with nothing but PyTorch, one task after another and differentiable to second order: query losses [T].

    `rates` is the inner learning rate of every adapted parameter by name; one with a dimension more than its parameter
    has a rate for every step first. `weights` are those of the losses after each step.
    """
    compute = LOSSES[loss]
    if weights is None:
        weights = [float(k == steps - 1) for k in range(steps)]
    start: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in rates}

    def loss_of(fast: Mapping[str, Tensor], x: Tensor, y: Tensor, step: int, query: bool) -> Tensor:
        rows = step_rows(model, step, query)  # of batch normalisation per step; empty for other networks
        return compute(functional_call(model, dict(fast) | rows, (x,)), y)

    losses = []
    for sx, sy, qx, qy in zip(batch.sx, batch.sy, batch.qx, batch.qy, strict=True):
        fast = start
        parts = [] if steps else [loss_of(fast, qx, qy, 0, True)]
        for k, weight in enumerate(weights):
            grads = torch.autograd.grad(loss_of(fast, sx, sy, k, False), list(fast.values()), create_graph=True)
            fast = {n: p - _rate_at(rates[n], p, k) * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            if weight:
                parts.append(weight * loss_of(fast, qx, qy, k + 1, True))
        losses.append(torch.stack(parts).sum())
    return torch.stack(losses)


def _rate_at(rate: Tensor | float, parameter: Tensor, step: int) -> Tensor | float:
    return rate[step] if isinstance(rate, Tensor) and rate.ndim > parameter.ndim else rate


def plain_step(
    maml: mtml.MAML,
    optimizer: Any,
    stream: Iterator[TaskBatch],
    loss: str,
    weights: Weights = _last_alone,
    ranks: Ranks = ALONE,
) -> Callable[[], Tensor]:
    """As `engine_step`, on the same learner, the plain way."""

    def losses_of(share: TaskBatch) -> Tensor:
        if not share.tasks:
            return no_losses(maml)
        rates = inner_rates(maml)
        return plain_losses(maml.module, share, rates=rates, steps=maml.steps, loss=loss, weights=weights())

    return _step(losses_of, maml, optimizer, stream, ranks)
