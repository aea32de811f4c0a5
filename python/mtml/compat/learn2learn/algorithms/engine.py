"""The batched engine for a learner: one `mtml.MAML`, kept on it, so that a training loop traces its model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from mtml.algorithms.base import CallOptions, Loss
from mtml.algorithms.maml import MAML as Batched

__all__ = ["bare", "batch_losses"]


def bare(module: Any) -> nn.Module:
    """The model within a DataParallel, which the batched engine does not need."""
    found: nn.Module = module.module if isinstance(module, DataParallel) else module
    return found


def batch_losses(
    learner: nn.Module,
    lr: Any,
    tasks: tuple[Any, Any, Any, Any],
    losses: tuple[Loss, Loss | None],
    options: CallOptions,
    *,
    allow_unused: bool,
    batch_norm: str,
    update: Callable[..., Any] | None = None,
) -> Tensor:
    """The query losses [T] of a batch (sx, sy, qx, qy) by the learner's engine."""
    if options.get("first_order") is None:
        options["first_order"] = bool(learner.first_order)
    engine = _engine(learner, lr, losses, batch_norm, update)
    engine.allow_unused = allow_unused
    return engine.meta_loss(*tasks, **options)


def _engine(
    learner: nn.Module, lr: Any, losses: tuple[Loss, Loss | None], batch_norm: str, update: Callable[..., Any] | None
) -> Batched:
    """The learner's own, made where there is none for its model and losses."""
    model = bare(learner.module)
    key = (model, *losses, update, batch_norm)
    kept = learner.__dict__.get("_engine")
    if kept is None or any(a is not b for a, b in zip(kept[0], key, strict=True)) or _other_kind(kept[1].lr, lr):
        new = Batched(
            model,
            lr,
            loss=losses[0],
            query_loss=losses[1],
            batch_norm=batch_norm,
            update=update,
            backend="auto" if update is None else "general",
        )
        kept = learner.__dict__["_engine"] = key, new
    engine: Batched = kept[1]
    engine.lr = lr
    return engine


def _other_kind(before: Any, now: Any) -> bool:
    """A module holds a parameter, a module and anything else in places of their own."""
    return any(isinstance(before, kind) != isinstance(now, kind) for kind in (nn.Parameter, nn.Module))
