"""The path of any model, loss and update rule, in PyTorch operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject
from mtml.paths.path import Outcome
from mtml.paths.rates import Rates
from mtml_kernels.checks import Sizes, check_class_ids
from mtml_kernels.general import GeneralPlan, general_inner_loop
from mtml_kernels.general.task import TaskRule
from mtml_kernels.losses import IGNORED
from mtml_kernels.neutral import hooked

__all__ = ["General", "general_data"]


def general_data(batch: Batch) -> dict[str, Any]:
    """What the general path reads of a batch, by name: every tensor [T, ...]."""
    data: dict[str, Any] = dict(batch.given())
    if batch.extras is not None:
        if batch.extras.start is not None:
            data["start"] = dict(batch.extras.start)
        if batch.extras.moments is not None:
            data["moments"] = {moment: dict(tensors) for moment, tensors in batch.extras.moments.items()}
    return data


class General:
    """`mtml_kernels.general` on the module itself.

    classes: how many the ids in sy and qy may name; 0 where they are none.
    """

    kind = "general"

    def __init__(
        self,
        rule: TaskRule,
        plan: GeneralPlan,
        tensors: Mapping[str, Tensor],
        rates: Rates,
        classes: tuple[int, int],
    ) -> None:
        self.rule, self.plan, self.rates, self.classes = rule, plan, rates, classes
        self.theta = {name: tensors[name] for name in rule.adapted}
        self.notice: tuple[str, str] | None = None

    def __call__(self, batch: Batch) -> Outcome:
        if self.classes[0]:
            check_class_ids("sy", batch.sy, self.classes[0], IGNORED)
        if self.classes[1] and batch.qy is not None:
            check_class_ids("qy", batch.qy, self.classes[1], IGNORED)
        plan = self.plan
        if plan.mode == "vmap" and hooked():  # which torch.func's grad refuses
            plan = replace(plan, mode="loop")
        data = batch.given() if batch.extras is None else general_data(batch)
        return Outcome(*general_inner_loop(self.rule, plan, self.theta, self.rates(), data, batch.weights))

    def shaped(self, output: Any) -> Any:
        """The output as the model gave it."""
        return output

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        reasons = subject.reasons or ["backend: 'general' was asked for"]
        return Explanation(
            path=self.kind,
            kernel=self.plan.mode,
            reason=f"{'; '.join(reasons)}; {self.plan.reason}",
            reasons=reasons,
            nodes=subject.nodes,
            trunk=self._trunk(),
            low_rank=0,
            adapted=list(self.rule.adapted),
            steps=self.rule.steps,
            first_order=self.rule.first_order,
            loss=subject.loss,
            query_loss=subject.query_loss,
            batch_norm=subject.batch_norm,
        )

    def _trunk(self) -> str:
        """What is said of the layers not adapted where no order of layers is known but that of their names."""
        if next((name for name, _ in self.rule.model.named_parameters()), "") in ("", *self.rule.adapted):
            return ""
        return "it runs in every step: the general path does not look into models; mtml.ANIL runs any trunk once"
