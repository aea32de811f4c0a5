"""The path of a traced model: its whole inner loop as one call of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.inner import Rule
from mtml.paths.batch import Batch
from mtml.paths.explain import Explanation, Subject, with_isa
from mtml.paths.path import Outcome, in_our_words
from mtml.paths.predicted import launched, predicted
from mtml.paths.rates import Rates
from mtml_kernels.checks import Sizes, check_class_ids, widened
from mtml_kernels.cuda.backends import FORMS as CUDA_FORMS
from mtml_kernels.losses import IGNORED
from mtml_kernels.native.inner_loop import call_threads, low_rank_weights
from mtml_kernels.ops.inner_loop import BACKENDS, inner_loop_call, task_gradients_call
from mtml_kernels.ops.inner_loop_backends import FORMS
from mtml_kernels.program import Program
from mtml_kernels.schedule.describe import SCHEDULED
from mtml_kernels.schema.inner_loop import KEEP_STEPS, TASKS_APART, InnerLoopArgs, InnerLoopSpec

__all__ = ["Fused"]

_NO_RULE: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())


class Fused:
    """A traced model, a known loss and plain gradient steps: one call of `mtml::inner_loop`."""

    kind = "fused"
    how = ""  # what explain() adds

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        adapted: Sequence[str],
        rates: Rates,
        spec: InnerLoopSpec,
        backend: str,
        names: tuple[Any, Any],
        classes: tuple[int, int] = (0, 0),
        rule: Rule | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.rule = None if rule is None or rule.plain else rule
        self.moments = () if self.rule is None else spec.rule.moments
        self.program, self.spec, self.rates, self.backend = program, spec, rates, backend
        self.params = [tensors[p.name] for p in program.params]
        read = {p.name for p in program.params}
        self.adapted = [p.name for p, flag in zip(program.params, spec.adapted, strict=True) if flag]
        # adapted by the caller's wish, but the model never reads them: they stay as they are
        self.idle = {name: tensors[name] for name in adapted if name not in read}
        self.order = list(adapted)
        self.dtype = self.params[0].dtype if dtype is None else dtype  # that is computed in
        self.copies = any(t.dtype is not self.dtype for t in self.params)
        self.float32 = False  # whether batches have tensors in half precision, to be copied
        self.support_names, self.query_names = names  # None: one tensor; else keys of a dict or indices of a tuple
        self.reshape = len(program.output_shape) != 1
        # > 0: class ids that are checked here, because the backend indexes without a look, or that are not int64
        self.classes = classes
        self.trunk = ""  # what explain() says of the layers before the first adapted one
        self.apart = spec.has(TASKS_APART)
        self.notice: tuple[str, str] | None = None
        # whether batches of plain tensors, and the model's own, go to a lane as they are, unless `float32`
        one = self.support_names is None and self.query_names is None and self.classes == (0, 0)
        plain = one and self.rule is None and not (self.copies or self.apart)
        self.plain = plain and BACKENDS.named(backend).fast_lane is not None

    def tensors(self) -> list[Tensor]:
        """The program's parameters in the dtype that is computed in."""
        return [t.to(self.dtype) for t in self.params]

    def low_rank(self, sizes: Sizes) -> int:
        """How many weights are held as the shared ones plus a low-rank correction for each task, in training."""
        if self.backend not in FORMS:
            return 0
        form = FORMS[self.backend]
        return low_rank_weights(self.tensors(), self.rates(), self.spec, sizes.support, sizes.query, form)

    def threads(self, sizes: Sizes) -> str:
        if self.backend not in FORMS:
            return ""
        used, most = call_threads(self.tensors(), self.rates(), self.spec, sizes, FORMS[self.backend])
        return f"at most {used} of {most}"

    def predicted(self, sizes: Sizes) -> tuple[str, list[dict[str, Any]]]:
        """The schedule in one line and its calls, where a schedule is what runs."""
        if self.backend not in SCHEDULED:
            return "", []
        return predicted(self.program, self.tensors(), self.rates(), self._numbers(), self.spec, sizes)

    def launched(self, sizes: Sizes) -> str:
        """How one launch runs all of it, where a schedule could be that or is."""
        if self.backend not in SCHEDULED and self.backend not in CUDA_FORMS:
            return ""
        form = self.backend if self.backend in CUDA_FORMS else "cuda"
        return launched(self.program, self.tensors(), self.rates(), self._numbers(), self.spec, sizes, form)

    def _numbers(self) -> Sequence[Tensor]:
        """The update rule's, for what only looks at their shapes."""
        return () if self.rule is None else (self.rule.vector(torch.device("cpu")),)

    def __call__(self, batch: Batch) -> Outcome:
        if self.float32:
            batch = batch.in_float32()
        sx, qx, sy, qy = batch.sx, batch.qx, batch.sy, batch.qy
        sm, qm, sw = batch.support_mask, batch.query_mask, batch.weights
        if self.classes != (0, 0):
            sy, qy = self._labels(sy, qy)
        if sm is not None and sm.dtype is not self.dtype:
            sm = sm.to(self.dtype)
        if qm is not None and qm.dtype is not self.dtype:
            qm = qm.to(self.dtype)
        if sw is not None:
            sw = torch.as_tensor(sw, dtype=self.dtype, device=self.params[0].device)
        support = [sx] if self.support_names is None else self.inputs(sx, self.support_names)
        query = [] if qx is None else [qx] if self.query_names is None else self.inputs(qx, self.query_names)
        lr = self.rates.constant
        if lr is None:
            lr = self.rates()
        params, rule = self.tensors() if self.copies else self.params, _NO_RULE
        if self.rule is not None or batch.extras is not None:
            params, rule = self._starts(batch, params), self._rule(batch)
        try:
            if self.apart:
                lists = (params, lr, support, query, [*rule[0]], [*rule[1]])
                a = InnerLoopArgs(*lists, sy, qy, sm, qm, sw, self.spec, needs=0)
                return self._apart(*task_gradients_call(a, self.backend))
            found = inner_loop_call(self.spec, params, support, sy, query, qy, sm, qm, lr, sw, self.backend, *rule)
        except (TypeError, ValueError) as error:
            raise in_our_words(error) from None
        loss, output, support_losses, kept = found
        return Outcome(loss, output, support_losses, *(self._named(kept, batch) if self.spec.keep else ({}, None)))

    def _apart(self, loss: Tensor, grads: Sequence[Tensor]) -> Outcome:
        """The losses with each task's own gradients, by name, where adapted tensors stand otherwise."""
        names = [p.name for p in self.program.params]
        return Outcome(loss, None, loss.new_zeros(0, len(loss)), dict(zip(names, grads, strict=True)))

    def _starts(self, batch: Batch, params: list[Tensor]) -> list[Tensor]:
        """The parameters of a call: the model's, or of the adapted ones each task's own."""
        if batch.extras is None or batch.extras.start is None:
            return params
        start, tasks = batch.extras.start, batch.tasks
        return [
            t if not flag else start[p.name] if p.name in start else t.expand(tasks, *t.shape)
            for t, flag, p in zip(params, self.spec.adapted, self.program.params, strict=True)
        ]

    def _rule(self, batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The update rule's numbers, and the moments that it starts from."""
        if self.rule is None:
            return _NO_RULE
        given = batch.extras.moments if batch.extras is not None else None
        moments = [given[m][name] for m in self.moments for name in self.adapted] if given else []
        return (self.rule.vector(self.params[0].device),), moments

    def inputs(self, x: Any, names: Sequence[Any] | None) -> list[Tensor]:
        """The program's inputs [T, N, ...] out of x."""
        return [x] if names is None else [x[name] for name in names]

    def explain(self, subject: Subject, sizes: Sizes) -> Explanation:
        low_rank = self.low_rank(sizes)
        line, calls = self.predicted(sizes)
        why = f"every layer is fused, {self.spec.steps} steps in one call{self.how}"
        if low_rank:
            why += f"; {low_rank} weight{'' if low_rank == 1 else 's'} as shared values plus low-rank corrections"
        return Explanation(
            path=self.kind,
            kernel=with_isa(self.backend),
            reason=why,
            reasons=[],
            nodes=subject.nodes,
            trunk=self.trunk,
            low_rank=low_rank,
            adapted=list(self.order),
            steps=self.spec.steps,
            first_order=self.spec.first_order,
            loss=subject.loss,
            query_loss=subject.query_loss,
            batch_norm=subject.batch_norm,
            predicted=line,
            calls=calls,
            launch=self.launched(sizes),
            threads=self.threads(sizes),
        )

    def shaped(self, output: Tensor) -> Tensor:
        """[T, Q, out] as [T, Q, *shape of the model's output]."""
        return output.reshape(*output.shape[:2], *self.program.output_shape) if self.reshape else output

    def _named(
        self, kept: Sequence[Tensor], batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]] | None]:
        """The adapted tensors, and the update rule's moments where it has any."""
        tasks, count = batch.tasks, len(self.adapted)
        lead = (self.spec.steps + 1,) if self.spec.keep == KEEP_STEPS else ()
        start = {} if batch.extras is None or batch.extras.start is None else batch.extras.start
        found = dict(zip(self.adapted, kept[:count], strict=True))
        for name, tensor in self.idle.items():
            own = start[name] if name in start else tensor.expand(tasks, *tensor.shape)
            found[name] = own.expand(*lead, *own.shape).clone()
        planes = [kept[at : at + count] for at in range(count, len(kept), count)]
        names = self.moments if planes else ()
        moments = {m: dict(zip(self.adapted, plane, strict=True)) for m, plane in zip(names, planes, strict=True)}
        return {name: found[name] for name in self.order}, moments or None

    def _labels(self, sy: Tensor, qy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The targets, class ids among them checked and as int64."""
        if self.classes[0]:
            check_class_ids("sy", sy, self.classes[0], IGNORED)
            sy = widened(sy)
        if self.classes[1] and qy is not None:
            check_class_ids("qy", qy, self.classes[1], IGNORED)
            qy = widened(qy)
        return sy, qy
