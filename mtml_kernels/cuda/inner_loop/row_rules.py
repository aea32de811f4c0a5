"""Softmax, losses and weights of samples as instructions."""

from __future__ import annotations

import dataclasses
import math

from mtml_kernels.cuda.inner_loop.instructions import Instruction, Operand, View
from mtml_kernels.cuda.inner_loop.lowering import Lowering, Unsupported, factor_of, lowers
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.schedule.kernels import Loss
from mtml_kernels.schema.losses import KINDS

__all__: list[str] = []

Maybe = View | None
_IDS = KINDS.index("cross_entropy")


@lowers("softmax.forward", "softmax.backward", "softmax.tangent", "softmax.back_tangent")
def _softmax(lowering: Lowering, part: Part) -> None:
    op = {
        "softmax.forward": ScheduleOp.SOFTMAX_FORWARD,
        "softmax.backward": ScheduleOp.SOFTMAX_BACKWARD,
        "softmax.tangent": ScheduleOp.SOFTMAX_TANGENT,
        "softmax.back_tangent": ScheduleOp.SOFTMAX_TWICE,
    }[part.kernel]
    reads = [lowering.maybe(plane) for plane in part.reads]
    lowering.elements(op, reads, [lowering.new(part.writes[0])], wholes=(int(part.constants),))


class _Samples:
    """The operands of a loss: element j of sample n is (row g, feature f) of the output z [N, R, F]."""

    def __init__(self, lowering: Lowering, part: Part, z: View) -> None:
        self.lowering, self.given = lowering, part.constants
        self.space, _ = z.padded()

    def like_output(self, view: Maybe) -> Operand | None:
        """z, or what has its shape or as many elements a sample."""
        if view is None:
            return None
        n, r, f = self.space
        if math.prod(view.shape[1:]) == r * f and view.shape[0] in (1, n):
            found = view.reshaped((view.shape[0], r, f))
            if found is None:
                found = self.lowering.flat(view).reshaped((view.shape[0], r, f))
            assert found is not None
            view = found
        (own, _, _), (sn, sr, sf) = view.padded()
        if own not in (1, n):
            raise Unsupported(f"a loss of {own} samples on {n}")
        return Operand(view.memory, view.offset, sn, 0, sr, sf)

    def result(self, plane: int) -> Operand | None:
        """Memory for what is like the output, in whatever shape the caller has it; None where it is not wanted."""
        if plane == ABSENT:
            return None
        made = self.lowering.scratch(self.space, self.lowering.dtype_of(plane))
        found = made.reshaped(self.lowering.shape(plane))
        assert found is not None
        self.lowering.alias(plane, found)
        return self.like_output(made)

    def by_sample(self, view: Maybe) -> Operand | None:
        """[N], or [N, 1, ...]"""
        return _by_sample(self.lowering, view)

    def target(self, view: Maybe) -> Operand | None:
        """Class ids, or values like the output."""
        return self.by_sample(view) if self.given.kind == _IDS else self.like_output(view)

    def emit(self, op: ScheduleOp, reads: list[Operand | None], writes: list[Operand | None]) -> None:
        """One row a sample."""
        n, r, f = self.space
        given: Loss = self.given
        unit = 1.0 if given.total else 1.0 / max(1, n)
        self.lowering.emit(
            Instruction(
                op, n, r * f, tuple(reads), tuple(writes), sample=1, group=f, wholes=(given.kind, int(given.total)),
                reals=(given.p0, unit),
            )
        )  # fmt: skip


def _scalar(view: Maybe) -> Operand | None:
    return None if view is None else Operand(view.memory, view.offset, 0, 0, 0, 0)


@lowers("loss.forward")
def _forward(lowering: Lowering, part: Part) -> None:
    z, target, c = map(lowering.maybe, part.reads)
    assert z is not None
    s = _Samples(lowering, part, z)
    each, d = map(lowering.new, part.writes)
    reads = [s.like_output(z), s.target(target), s.by_sample(c)]
    s.emit(ScheduleOp.LOSS_FORWARD, reads, [s.by_sample(each), s.like_output(d)])


@lowers("loss.tangent", "loss.data")
def _derivatives(lowering: Lowering, part: Part) -> None:
    z, zt, target, c, seed = map(lowering.maybe, part.reads)
    assert z is not None
    s = _Samples(lowering, part, z)
    reads = [s.like_output(z), s.like_output(zt), s.target(target), s.by_sample(c), _scalar(seed)]
    if part.kernel == "loss.tangent":
        s.emit(ScheduleOp.LOSS_TANGENT, reads, [s.like_output(lowering.new(part.writes[0]))])
    else:
        dtarget, dc = part.writes
        s.emit(ScheduleOp.LOSS_DATA, reads, [s.result(dtarget), s.by_sample(lowering.new(dc))])


@lowers("loss.sum")
def _sum(lowering: Lowering, part: Part) -> None:
    each, c = map(lowering.maybe, part.reads)
    assert each is not None
    out = lowering.new(part.writes[0])
    assert out is not None
    (samples,) = each.shape
    views = [each] if c is None else [each, c]
    rows = [dataclasses.replace(view, shape=(samples, 1, 1), strides=(view.strides[0], 0, 0)) for view in views]
    scale = 1.0 if c is not None or part.constants.total else 1.0 / max(1, samples)
    factors = [factor_of(view, (samples, 1, 1), (1, 1, 1)) for view in rows]
    lowering.sum_of_products(out, (1, 1, 1), (samples, 1, 1), [factors], scale)


def _by_sample(lowering: Lowering, view: Maybe) -> Operand | None:
    if view is None:
        return None
    flat = lowering.flat(view)
    return Operand(flat.memory, flat.offset, flat.strides[0], 0, 0, 0)


@lowers("weights.forward", "weights.backward")
def _weights(lowering: Lowering, part: Part) -> None:
    views = [lowering.maybe(plane) for plane in part.reads]
    target = views[-1]
    ids = target if target is not None and not target.memory.dtype.is_floating_point else None
    made = [lowering.new(plane) for plane in part.writes]
    out = next(view for view in made if view is not None)
    samples = out.shape[0]
    if part.kernel == "weights.forward":
        reads = [_by_sample(lowering, views[0]), _by_sample(lowering, ids)]
        if made[0] is None:  # the instruction writes c
            made[0] = lowering.scratch((samples,), out.memory.dtype)
        op, writes = ScheduleOp.SAMPLE_WEIGHTS, [_by_sample(lowering, made[0]), _scalar(made[1])]
    else:
        dc, c, total, _ = views
        reads = [_by_sample(lowering, dc), _by_sample(lowering, c), _scalar(total), _by_sample(lowering, ids)]
        op, writes = ScheduleOp.SAMPLE_WEIGHTS_BACK, [_by_sample(lowering, made[0])]
    wholes = (int(part.constants.total),)
    lowering.emit(Instruction(op, samples, 1, tuple(reads), tuple(writes), sample=1, wholes=wholes))
