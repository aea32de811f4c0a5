"""A fused path under a loss that its user wrote otherwise than the engine: with a factor, flat targets, other ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject
from mtml.paths.fused import Fused
from mtml.paths.general import General
from mtml.paths.path import Outcome
from mtml.paths.trunk import TrunkOnce
from mtml_kernels.checks import Sizes, check_in_graph
from mtml_kernels.losses import LossSpec, Opaque, Recognised

__all__ = ["OTHER_IDS", "AsWritten", "as_written"]

OTHER_IDS = "sy, qy: class ids below 0, which the loss callable treats otherwise than the engine"


def as_written(
    path: Fused | TrunkOnce, losses: Sequence[LossSpec | Recognised | Opaque], live: Callable[[Batch], General]
) -> Fused | TrunkOnce | AsWritten:
    """The path itself where its losses are just those of the engine; live: makes the general path for a batch."""
    if all(isinstance(loss, LossSpec) or (isinstance(loss, Recognised) and loss.plain) for loss in losses):
        return path
    known = [loss if isinstance(loss, Recognised) else None for loss in losses]
    return AsWritten(path, known, live)


class AsWritten:
    """The engine's path, on targets in its form, with results in the user's scale.

    A factor c of the support loss is one of the rates: theta - (c lr) grad = theta - lr grad(c loss), to every order.
    """

    kind = "fused"

    def __init__(
        self, path: Fused | TrunkOnce, losses: Sequence[Recognised | None], live: Callable[[Batch], General]
    ) -> None:
        self.path, self.make_live = path, live
        self.live: General | None = None
        self.notice: tuple[str, str] | None = None
        self.support, self.query = losses  # None: known by name
        self.factors = tuple(1.0 if loss is None else loss.scale for loss in losses)
        engine = path.head if isinstance(path, TrunkOnce) else path
        self.output = engine.program.output_shape
        engine.rates = engine.rates.times(self.factors[0])

    def read_by_calls(self) -> dict[str, Any]:
        """What calls depend on, but for those that run live."""
        return {name: value for name, value in vars(self).items() if name not in ("make_live", "live", "notice")}

    def __call__(self, batch: Batch) -> Outcome:
        if _has_other_ids(self.support, batch.sy) or _has_other_ids(self.query, batch.qy):
            if self.live is None:
                self.live = self.make_live(batch)
                self.notice = self.live.plan.mode, OTHER_IDS
            return self.live(batch)
        found = self.path(self._in_form(batch))
        loss, support_losses = found.loss, found.support_losses
        if self.factors[0] != 1.0:
            support_losses = self.factors[0] * support_losses
        if self.factors[1] != 1.0 and batch.qx is not None:
            loss = self.factors[1] * loss
        return found._replace(loss=loss, support_losses=support_losses)

    def _in_form(self, batch: Batch) -> Batch:
        """Targets in the shape of the outputs."""
        steps = 1 if batch.extras is not None and batch.extras.per_step else 0
        sy, qy = self._shaped(self.support, batch.sy, 2 + steps), self._shaped(self.query, batch.qy, 2)
        sx, qx, masks = batch.sx, batch.qx, (batch.support_mask, batch.query_mask)
        same = sy is batch.sy and qy is batch.qy
        return batch if same else Batch(sx, sy, qx, qy, *masks, batch.weights, batch.extras)

    def _shaped(self, loss: Recognised | None, target: Any, lead: int) -> Any:
        flat = loss is not None and loss.flat and target is not None
        return target.reshape(*target.shape[:lead], *self.output) if flat else target

    def shaped(self, output: Any) -> Any:
        """The outcome's output [T, Q, ...] in the shape that the model gives it."""
        return self.path.shaped(output)

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        return self.path.explain(subject, sizes)


def _has_other_ids(loss: Recognised | None, target: Tensor | None) -> bool:
    """Whether there are ids that mean something else to the loss than to the engine: negative ones."""
    if loss is None or loss.passes_over or target is None:
        return False
    if is_compiling():
        check_in_graph((target >= 0).all(), f"{OTHER_IDS}; call it outside torch.compile")
        return False
    return bool((target < 0).any())
