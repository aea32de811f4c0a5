"""The batched engine for a learner: one `mtml.MAML`, kept on it, so that a training loop traces its model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from mtml.algorithms.base import Loss, StepOptions
from mtml.algorithms.maml import MAML as Batched
from mtml.compat.follow import follow
from mtml.compat.rate import scalar

__all__ = ["Batchable", "Inner", "bare"]


def bare(module: Any) -> nn.Module:
    """The model within a DataParallel, which the batched engine does not need."""
    found: nn.Module = module.module if isinstance(module, DataParallel) else module
    return found


class Inner(NamedTuple):
    """The inner step of a learner, as `mtml.MAML` takes it."""

    lr: Any
    allow_unused: bool
    update: Callable[..., Any] | None = None


class Batchable:
    """What has a `module` and an inner step has them for a batch of tasks too. What is kept is no part of its state."""

    module: Any
    first_order: bool

    def _inner(self) -> Inner:
        """The learner's inner step, as it is now."""
        raise NotImplementedError

    def meta_loss(
        self,
        sx: Any,
        sy: Any = None,
        qx: Any = None,
        qy: Any = None,
        *,
        steps: int = 1,
        loss: Loss = "cross_entropy",
        query_loss: Loss | None = None,
        batch_norm: str = "module",
        **options: Unpack[StepOptions],
    ) -> Tensor:
        """The query loss of every task [T], as the loop over tasks computes it, in one call of the batched engine.

        Args:
            sx, sy, qx, qy: a batch of tasks, sx [T, S, ...] and so on, as `mtml.MAML` takes them.
            steps: inner gradient steps.
            loss, query_loss: what the loop computes from outputs and targets, such as the `nn.CrossEntropyLoss()`.
            batch_norm: as of `mtml.MAML`. "module": running statistics stay as they are, on which no result depends
                in train mode; "track": they move as in the loop, for who calls `eval()` later, on a slower path.
            options: further ones of `mtml.MAML.meta_loss`.

        Parameters that require no grad stay as they are, with and without `allow_nograd`. `GBML` runs on the general
        path. With its `allow_unused` the transform of a parameter that the loss does not depend on takes a gradient of
        zero, where the loop leaves the parameter alone: another result where a transform of zero is not zero.

        Raises:
            ValueError: a `GBML` with `adapt_transform`, which has no batched form.
        """
        if options.get("first_order") is None:
            options["first_order"] = bool(self.first_order)
        engine = self._batched(self._inner(), loss, query_loss, batch_norm)
        return engine.meta_loss(sx, sy, qx, qy, steps=steps, **options)

    def _batched(self, inner: Inner, loss: Loss, query_loss: Loss | None, batch_norm: str) -> Batched:
        """The learner's own, made where there is none for its model; what else changes it follows."""
        model, update = bare(self.module), inner.update
        given = {"lr": scalar(inner.lr), "loss": loss, "query_loss": query_loss}
        kept: Batched | None = self.__dict__.get("_engine")
        same = kept is not None and kept.module is model and kept.update is update and kept.batch_norm == batch_norm
        if kept is None or not same or any(_other_kind(getattr(kept, name), given[name]) for name in given):
            backend = "auto" if update is None else "general"
            kept = self.__dict__["_engine"] = Batched(
                model, **given, batch_norm=batch_norm, update=update, backend=backend
            )
        return follow(kept, **given, allow_unused=inner.allow_unused)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made for it and is made anew when it is missing."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}


def _other_kind(before: Any, now: Any) -> bool:
    """A module holds a parameter, a module and anything else in places of their own."""
    return any(isinstance(before, kind) != isinstance(now, kind) for kind in (nn.Parameter, nn.Module))
