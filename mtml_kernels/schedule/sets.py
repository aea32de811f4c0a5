"""One set of samples as the schedule knows it: where its tensors come from, its loss, and what flows back to them."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from mtml_kernels.program.encoding import Encoded
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Draft
from mtml_kernels.schedule.kernels import Loss
from mtml_kernels.schedule.passes import Along, Pass
from mtml_kernels.schema.inner_loop import PER_STEP, InnerLoopArgs

__all__ = ["DataSink", "Judged", "SampleSet"]


@dataclasses.dataclass
class DataSink:
    """Cotangents of a set's tensors, summed over the passes that read them; ABSENT: none yet."""

    inputs: dict[int, int] = dataclasses.field(default_factory=dict)
    target: int = ABSENT
    mask: int = ABSENT


@dataclasses.dataclass
class Judged:
    """A pass with its loss: of each sample, and the cotangent of the output."""

    on: Pass
    output: int
    each: int  # [T, N]
    cotangent: int


class SampleSet:
    """The support sets or the query sets of all tasks; those of step k where there is one for every step."""

    def __init__(self, draft: Draft, a: InnerLoopArgs, program: Encoded, query: bool) -> None:
        self.draft, self.program, self.query, self.tasks = draft, program, query, a.tasks
        self.name = "query" if query else "support"
        self.per_step = a.spec.has(PER_STEP) and not query
        kind, reduction = a.spec.query_loss if query else a.spec.support_loss
        self.loss = Loss(kind, a.spec.loss_args[int(query)], bool(reduction), draft.wide)
        self._x = a.query_x if query else a.support_x
        self._y = a.query_y if query else a.support_y
        self._mask = a.query_mask if query else a.support_mask
        self.samples = (self._x[0].shape[1] if query else a.support_samples) if self._x else 0
        self.judged = self.samples > 0 and self._y is not None  # a set of no samples has the loss 0
        self._weights: dict[int | None, tuple[int, int]] = {}

    def _step(self, k: int) -> int | None:
        return k if self.per_step else None

    def _argument(self, field: str, index: int, tensor: Tensor, k: int) -> int:
        shape = (tensor.shape[0], *tensor.shape[2:]) if self.per_step else tuple(tensor.shape)
        dtype = tensor.dtype if not tensor.is_floating_point() else self.draft.dtype
        name = f"{field} {index}" if field.endswith("_x") else field
        return self.draft.argument(field, index, shape, name, step=self._step(k), dtype=dtype)

    def inputs(self, k: int) -> list[int]:
        """The planes of its inputs, [T, N, ...]."""
        return [self._argument(f"{self.name}_x", i, x, k) for i, x in enumerate(self._x)]

    def target(self, k: int) -> int:
        """The plane of its targets."""
        assert self._y is not None
        return self._argument(f"{self.name}_y", 0, self._y, k)

    def mask(self, k: int) -> int:
        """The plane of the weights that the caller gave."""
        return ABSENT if self._mask is None else self._argument(f"{self.name}_mask", 0, self._mask, k)

    def weights(self, k: int) -> tuple[int, int]:
        """(c, total) of a mask or of class ids; ABSENT where all samples weigh the same."""
        assert self._y is not None
        if self._mask is None and self._y.is_floating_point():
            return ABSENT, ABSENT
        at = self._step(k)
        if at not in self._weights:
            shapes = [(self.tasks, self.samples), None if self.loss.total else (self.tasks,)]
            reads, wide = (self.mask(k), self.target(k)), self.draft.wide
            c, total = self.draft.emit(
                "weights.forward", reads, shapes, f"weights of the {self.name} set", self.loss, [wide, wide]
            )
            self._weights[at] = c, total
        return self._weights[at]

    # --- passes -----------------------------------------------------------------------------------------------------

    def run(self, theta: list[int], k: int, consts: list[float], rows: dict[int, int]) -> Pass:
        """All values at theta."""
        inputs = self.inputs(k)
        p = Pass(self.draft, self.program, consts, self.tasks, self.samples, theta, inputs, rows)
        p.run()
        return p

    def judge(self, p: Pass, k: int, value: bool, cotangent: bool) -> Judged:
        """The losses of a pass' samples and the cotangent of its output, as far as they are wanted."""
        output = p.values[self.program.output]
        if not self.judged:
            return Judged(p, output, ABSENT, ABSENT)
        shapes = [
            (self.tasks, self.samples) if value else None,
            p.shape(self.program.output) if cotangent else None,
        ]
        each = d = ABSENT
        if value or cotangent:
            dtypes = [self.draft.wide, self.draft.dtype]
            reads = (output, self.target(k), self.weights(k)[0])
            each, d = self.draft.emit("loss.forward", reads, shapes, f"loss of the {self.name} set", self.loss, dtypes)
        return Judged(p, output, each, d)

    def total(self, each: int, k: int) -> int:
        """Every task's loss [T]."""
        reads = (each, self.weights(k)[0])
        name = f"{self.name} loss"
        return self.draft.emit("loss.sum", reads, [(self.tasks,)], name, self.loss, [self.draft.wide])[0]

    def along(self, p: Pass, along: Along | None, seed: int, k: int) -> int:
        """The tangent of the output's cotangent along a direction, and `seed` [T] times the cotangent itself."""
        zt = ABSENT if along is None else along.values[self.program.output]
        if zt == seed == ABSENT or not self.judged:
            return ABSENT
        reads = (p.values[self.program.output], zt, self.target(k), self.weights(k)[0], seed)
        shape = p.shape(self.program.output)
        return self.draft.one("loss.tangent", reads, shape, f"along V, of the {self.name} loss", self.loss)

    def data(self, p: Pass, along: Along | None, seed: int, k: int, wants: tuple[bool, bool], sink: DataSink) -> None:
        """What flows to targets and weights."""
        zt = ABSENT if along is None else along.values[self.program.output]
        if not (any(wants) and self.judged) or zt == seed == ABSENT:
            return
        target, (c, total), wide = self.target(k), self.weights(k), self.draft.wide
        reads = (p.values[self.program.output], zt, target, c, seed)
        shapes = [self.draft.shape(target) if wants[0] else None, (self.tasks, self.samples) if wants[1] else None]
        dy, dc = self.draft.emit(
            "loss.data", reads, shapes, f"to {self.name} data", self.loss, [self.draft.dtype, wide]
        )
        sink.target = self.draft.sum_of(sink.target, dy, f"to the {self.name} targets")
        if wants[1]:
            operands, shape = (dc, c, total, target), (self.tasks, self.samples)
            (mask,) = self.draft.emit(
                "weights.backward", operands, [shape], f"to the {self.name} mask", self.loss, [self.draft.wide]
            )
            sink.mask = self.draft.sum_of(sink.mask, mask, f"to the {self.name} mask")
