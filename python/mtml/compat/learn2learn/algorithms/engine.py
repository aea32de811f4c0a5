"""The batched engine for a learner: one `mtml.MAML`, kept on it, so that a training loop traces its model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from mtml.algorithms.base import Loss
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
    options: dict[str, Any],
    *,
    allow_unused: bool,
    batch_norm: str,
    update: Callable[..., Any] | None = None,
) -> Tensor:
    """The query losses [T] of a batch (sx, sy, qx, qy) by the learner's engine."""
    if options.get("first_order") is None:
        options["first_order"] = bool(learner.first_order)
    given = {"lr": lr, "loss": losses[0], "query_loss": losses[1]}
    engine = _engine(learner, given, batch_norm, update)
    engine.allow_unused = allow_unused
    return engine.meta_loss(*tasks, **options)


def _engine(learner: nn.Module, given: dict[str, Any], batch_norm: str, update: Callable[..., Any] | None) -> Batched:
    """The learner's own, made where there is none for its model; what else changes it follows."""
    model = bare(learner.module)
    kept: Batched | None = learner.__dict__.get("_engine")
    same = kept is not None and kept.module is model and kept.update is update and kept.batch_norm == batch_norm
    if kept is not None and same and not any(_other_kind(getattr(kept, name), given[name]) for name in given):
        for name, value in given.items():
            setattr(kept, name, value)
        return kept
    backend = "auto" if update is None else "general"
    new = Batched(model, **given, batch_norm=batch_norm, update=update, backend=backend)
    learner.__dict__["_engine"] = new
    return new


def _other_kind(before: Any, now: Any) -> bool:
    """A module holds a parameter, a module and anything else in places of their own."""
    return any(isinstance(before, kind) != isinstance(now, kind) for kind in (nn.Parameter, nn.Module))
