"""One group of tasks: which of its tensors the inner loop adapts, and its batches as the engine takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtml.algorithms.maml import MAML
from mtml.multihead.heads import HeadLayer
from mtml.multitask.adapted import AdaptedGroup
from mtml.multitask.criterion import HeadCriterion, fused_criterion, fused_targets, packed
from mtml.multitask.features import GroupModel, HeadRows, as_rows
from mtml.multitask.targets import check_lead, check_set, like_targets, mask_rows, spread, target_rows
from mtml.params import ParamsArg, select
from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation
from mtml.tasks.task_batch import TaskBatch
from mtml_kernels.checks import leaves
from mtml_kernels.general import GeneralPlan

__all__ = ["Group"]

HEAD = "head."


class Group:
    """A trunk, a head, and a learner of them.

    Where the head alone is adapted, the trunk runs once over all samples and the learner adapts the head on rows of
    features (`rows`): the same gradients, for what no step changes need not run in every step. Else the learner has the
    whole model.

    Groups of equal shapes and losses are not joined into one call: each has its own start, which one call takes only as
    a start for every task. That has no form in the Gram matrix, was no faster, and gives other bits than a task alone.
    """

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        layer: HeadLayer,
        lr: Any,
        *,
        steps: int,
        first_order: bool = False,
        params: ParamsArg = None,
        update: Callable[..., Any] | None = None,
        backend: str = "auto",
    ) -> None:
        self.name, self.layer = name, layer
        self.model = GroupModel(trunk, layer)
        chosen = select(self.model, f"{HEAD}*" if params is None else params)
        self.rows = all(tensor.startswith(HEAD) for tensor in chosen)
        spec = fused_criterion(layer) if self.rows or layer.head.rank == 2 else None
        self.criterion = cast(Any, spec or HeadCriterion(layer, self.rows))  # MAML takes specifications too
        self.learner = MAML(
            HeadRows(layer) if self.rows else self.model,
            lr,
            first_order,
            steps=steps,
            loss=self.criterion,
            params=chosen,
            update=update,
            backend=backend,
        )

    def losses(self, batch: TaskBatch, **options: Any) -> Tensor:
        """The query loss of every task [T] after the inner loop, in the head's dtype under autocast too."""
        return self.learner.meta_loss(self.problem(batch), **options).to(self.layer.weight.dtype)

    def problem(self, batch: TaskBatch) -> TaskBatch:
        """The batch as the learner takes it."""
        sx, qx = batch.sx, batch.qx
        support, query = self.model.features(sx, qx) if self.rows else (None, None)
        sy, support_mask = self._set("sy", sx, batch.sy, batch.support_mask, support)
        qy, query_mask = self._set("qy", qx, batch.qy, batch.query_mask, query)
        if support is not None and query is not None:
            sx, qx = as_rows(self.layer.head, support), as_rows(self.layer.head, query)
        return TaskBatch(sx, sy, qx, qy, support_mask, query_mask)

    def support(self, sx: Any, sy: Any, mask: Tensor | None) -> tuple[Any, Any, Tensor | None]:
        """The support sets alone as the learner takes them."""
        features = self.model.features(sx)[0] if self.rows else None
        y, weights = self._set("sy", sx, sy, mask, features)
        return (sx if features is None else as_rows(self.layer.head, features)), y, weights

    def _set(
        self, name: str, x: Any, y: Any, mask: Tensor | None, features: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """One set's targets and mask, checked, as the learner's loss takes them."""
        label, head = f"{self.name}.{name}", self.layer.head
        check_lead(label, next(tensor for _, tensor in leaves("x", x)).shape[:2], y, mask)
        check_set(label, head, like_targets(head, y) if features is None else features, y, mask)
        if isinstance(self.criterion, HeadCriterion):
            weights = spread(head, y, mask)
            if self.rows:
                y, weights = target_rows(head, y), weights.flatten(1)
            return packed(y, weights, self.layer.weight.dtype), None
        if self.rows:
            y, mask = target_rows(head, y), mask_rows(head, y, mask)
        return fused_targets(self.layer, y, mask)

    def adapt(self, sx: Any, sy: Any, mask: Tensor | None = None, **options: Any) -> AdaptedGroup:
        """Models adapted to support sets; options as of `MAML.adapt_tasks`."""
        x, y, weights = self.support(sx, sy, mask)
        found = self.learner.adapt_tasks(x, y, support_mask=weights, **options)
        loss, plan = HeadCriterion(self.layer, rows=False), GeneralPlan("vmap", "", self.learner.batch_norm)
        losses, state = found.support_losses, found.state
        return AdaptedGroup(self.model, found._tensors, losses, loss, found.keep_steps, plan, state)

    def explain(self, batch: TaskBatch) -> Explanation:
        """How its inner loop runs."""
        model = self.model
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                self.model = copy.deepcopy(model)  # its running statistics may move
                problem = self.problem(batch)
            finally:
                self.model = model
        return self.learner._paths.explain(Batch(*problem))
