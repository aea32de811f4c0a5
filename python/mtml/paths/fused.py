"""The two ways a batch of tasks is run, each with everything that does not depend on the data already worked out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml.inner_lr import InnerLR
from mtml.params import by_first_name
from mtml_kernels.checks import Sizes, check_class_ids, check_finite, widened
from mtml_kernels.general import GeneralPlan, general_inner_loop
from mtml_kernels.general.task import TaskRule
from mtml_kernels.losses import IGNORED
from mtml_kernels.native.inner_loop import low_rank_weights
from mtml_kernels.neutral import hooked
from mtml_kernels.ops.inner_loop import inner_loop_call
from mtml_kernels.ops.inner_loop_backends import FORMS
from mtml_kernels.program import Program
from mtml_kernels.rates import op_rates
from mtml_kernels.schema.inner_loop import KEEP_STEPS, InnerLoopSpec

__all__ = ["Fused", "General", "Outcome", "Rates", "in_our_words"]


def in_our_words(error: Exception) -> Exception:
    """An error of the engine about targets, which its own functions call by other names, by the names used here."""
    argument, found, rest = str(error).partition(":")
    known = {"support_y": "sy", "query_y": "qy", "labels": "sy", "query_labels": "qy"}
    return type(error)(f"{known[argument]}:{rest}") if found and argument in known else error


class Outcome(NamedTuple):
    """What either path returns: loss [T], output [T, Q, ...], support_losses [K, T], adapted by name."""

    loss: Any
    output: Any
    support_losses: Tensor
    adapted: Mapping[str, Tensor]


class Rates:
    """Reads the inner learning rates of one call, in the op's form. Numbers are converted once, tensors every time."""

    def __init__(
        self,
        lr: Any,
        shapes: Mapping[str, torch.Size],
        steps: int,
        like: Tensor,
        known: Sequence[str],
        others: Mapping[str, str],  # further names of shared tensors, with their first
    ) -> None:
        self.lr, self.shapes, self.steps, self.known, self.others = lr, shapes, steps, known, others
        self.dtype, self.device, self.names = like.dtype, like.device, list(shapes)
        self._checked: list[int] | None = None
        first = self._read()
        # numbers alone never change, so their list is made once
        table = dict(lr.items()) if hasattr(lr, "items") else {"": lr}
        numbers = not isinstance(lr, InnerLR) and not any(isinstance(rate, Tensor) for rate in table.values())
        self.constant = first if numbers else None

    def __call__(self) -> list[Tensor]:
        return self.constant if self.constant is not None else self._read()

    def _read(self) -> list[Tensor]:
        if not isinstance(self.lr, InnerLR):
            lr = by_first_name(self.lr, self.others) if self.others and hasattr(self.lr, "items") else self.lr
            return op_rates(lr, self.shapes, self.steps, self.dtype, self.device, self.known)
        if self.lr.steps is not None and self.lr.steps < self.steps:
            raise ValueError(
                f"lr: expected at least steps={self.steps} rates, got InnerLR(steps={self.lr.steps}); "
                "pass fewer steps, or steps=None to share one rate"
            )
        rates = self.lr.read(self.names)
        self._check_finite(rates)
        count = max(self.steps, 1)
        rates = [r if r.shape[0] in (1, count) else r[:count] for r in rates]
        if rates and (rates[0].dtype, rates[0].device) != (self.dtype, self.device):
            return [r.to(self.device, self.dtype) for r in rates]
        return rates

    def _check_finite(self, rates: list[Tensor]) -> None:
        """Look at the values again only where they were written to since."""
        versions = [rate._version for rate in self.lr.rates._parameters.values()]
        if versions != self._checked:
            for rate in rates:
                check_finite("lr", rate)
            self._checked = versions


class Fused:
    """A traced model, a known loss and plain gradient steps: one call of `mtml::inner_loop`."""

    kind = "fused"
    how = trunk = ""  # what explain() adds
    notice: tuple[str, str] | None = None

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        adapted: Sequence[str],
        rates: Callable[[], list[Tensor]],
        spec: InnerLoopSpec,
        backend: str,
        names: tuple[Any, Any],
        classes: tuple[int, int] = (0, 0),
    ) -> None:
        self.program, self.spec, self.rates, self.backend = program, spec, rates, backend
        self.params = [tensors[p.name] for p in program.params]
        read = {p.name for p in program.params}
        self.adapted = [p.name for p, flag in zip(program.params, spec.adapted, strict=True) if flag]
        # adapted by the caller's wish, but the model never reads them: they stay as they are
        self.idle = {name: tensors[name] for name in adapted if name not in read}
        self.order = list(adapted)
        self.dtype = self.params[0].dtype
        self.support_names, self.query_names = names  # None: one tensor; else keys of a dict or indices of a tuple
        self.reshape = len(program.output_shape) != 1
        # > 0: class ids that are checked here, because the backend indexes without a look, or that are not int64
        self.classes = classes

    def low_rank(self, sizes: Sizes) -> int:
        """How many weights are held as the shared ones plus a low-rank correction for each task, in training."""
        if self.backend not in FORMS:
            return 0
        form = FORMS[self.backend]
        return low_rank_weights(self.params, self.rates(), self.spec, sizes.support, sizes.query, form)

    def inputs(self, x: Any, names: Sequence[Any] | None) -> list[Tensor]:
        return [x] if names is None else [x[name] for name in names]

    def __call__(self, sx: Any, sy: Any, qx: Any, qy: Any, sm: Any, qm: Any, sw: Any) -> Outcome:
        if self.classes != (0, 0):
            sy, qy = self._labels(sy, qy)
        if sm is not None and sm.dtype is not self.dtype:
            sm = sm.to(self.dtype)
        if qm is not None and qm.dtype is not self.dtype:
            qm = qm.to(self.dtype)
        if sw is not None:
            sw = torch.as_tensor(sw, dtype=self.dtype, device=self.params[0].device)
        queries = [] if qx is None else self.inputs(qx, self.query_names)
        data = (self.inputs(sx, self.support_names), sy, queries, qy, sm, qm)
        try:
            found = inner_loop_call(self.spec, self.params, *data, self.rates(), sw, self.backend)
        except (TypeError, ValueError) as error:
            raise in_our_words(error) from None
        loss, output, support_losses, adapted = found
        return Outcome(loss, output, support_losses, self._named(adapted, support_losses) if self.spec.keep else {})

    def shaped(self, output: Tensor) -> Tensor:
        """[T, Q, out] as [T, Q, *shape of the model's output]."""
        return output.reshape(*output.shape[:2], *self.program.output_shape) if self.reshape else output

    def _named(self, adapted: Sequence[Tensor], support_losses: Tensor) -> dict[str, Tensor]:
        tasks = support_losses.shape[1]
        lead = (self.spec.steps + 1, tasks) if self.spec.keep == KEEP_STEPS else (tasks,)
        found = dict(zip(self.adapted, adapted, strict=True))
        found |= {name: t.expand(*lead, *t.shape).clone() for name, t in self.idle.items()}
        return {name: found[name] for name in self.order}

    def _labels(self, sy: Tensor, qy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The targets, class ids among them checked and as int64."""
        if self.classes[0]:
            check_class_ids("sy", sy, self.classes[0], IGNORED)
            sy = widened(sy)
        if self.classes[1] and qy is not None:
            check_class_ids("qy", qy, self.classes[1], IGNORED)
            qy = widened(qy)
        return sy, qy


class General:
    """Any model, loss and update rule, in PyTorch operations (`mtml_kernels.general`)."""

    kind = "general"
    notice: tuple[str, str] | None = None  # mode and reasons of a FallbackWarning that is still to be given

    def __init__(
        self,
        rule: TaskRule,
        plan: GeneralPlan,
        tensors: Mapping[str, Tensor],
        rates: Callable[[], list[Tensor]],
        classes: tuple[int, int],
    ) -> None:
        self.rule, self.plan, self.rates, self.classes = rule, plan, rates, classes
        self.theta = {name: tensors[name] for name in rule.adapted}

    def __call__(self, sx: Any, sy: Any, qx: Any, qy: Any, sm: Any, qm: Any, sw: Any) -> Outcome:
        if self.classes[0]:
            check_class_ids("sy", sy, self.classes[0], IGNORED)
        if self.classes[1] and qy is not None:
            check_class_ids("qy", qy, self.classes[1], IGNORED)
        data, plan = batch_dict(sx, sy, qx, qy, sm, qm), self.plan
        if plan.mode == "vmap" and hooked():  # which torch.func's grad refuses
            plan = replace(plan, mode="loop")
        return Outcome(*general_inner_loop(self.rule, plan, self.theta, self.rates(), data, sw))

    def shaped(self, output: Any) -> Any:
        """The output as the model gave it."""
        return output


def batch_dict(sx: Any, sy: Any, qx: Any, qy: Any, sm: Any, qm: Any) -> dict[str, Any]:
    """What was given of a batch, by name."""
    parts = {"sx": sx, "sy": sy, "qx": qx, "qy": qy, "support_mask": sm, "query_mask": qm}
    return {name: value for name, value in parts.items() if value is not None}
