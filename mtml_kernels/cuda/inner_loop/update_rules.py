"""Update rules and clipping as instructions: a step of one tensor, its adjoint, the norm of all gradients of a task."""

from __future__ import annotations

from typing import Any

import torch

from mtml_kernels.cuda.inner_loop.instructions import Instruction, Operand, View
from mtml_kernels.cuda.inner_loop.lowering import Lowering, lowers, operand_of
from mtml_kernels.cuda.inner_loop.rules import inner, spread
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.schedule.kernels import Rule
from mtml_kernels.schema.update import RULES, UpdateSpec

__all__: list[str] = []


def _wholes(rule: Rule) -> tuple[int, int, int]:
    return RULES.index(rule.spec.rule), flags_of(rule.spec), rule.step


def flags_of(spec: UpdateSpec) -> int:
    """`enum UpdateFlag` of csrc/include/mtml/update.h."""
    return int(spec.encode()[1])


@lowers("update.rule")
def _rule(lowering: Lowering, part: Part) -> None:
    reads = [lowering.maybe(plane) for plane in part.reads]
    writes = [lowering.new(plane) for plane in part.writes]
    _on_parameters(lowering, ScheduleOp.RULE_STEP, reads, writes, wholes=_wholes(part.constants))


def _on_parameters(
    lowering: Lowering, op: ScheduleOp, reads: list[View | None], writes: list[View | None], **more: Any
) -> None:
    """`elements`, but for the numbers, which are read as they lie."""
    _, r, f = space = next(view for view in reads[1:2] if view is not None).padded()[0]
    operands = [raw(view) if i == 3 else operand_of(view, space) for i, view in enumerate(reads)]
    results = [raw(v) if v is not None and v.shape == (8,) else operand_of(v, space) for v in writes]
    lowering.emit(Instruction(op, space[0] * r, f, tuple(operands), tuple(results), sample=r, **more))


def raw(view: View | None) -> Operand | None:
    """What an instruction addresses itself."""
    return None if view is None else Operand(view.memory, view.offset, 0, 0, 0, 0)


@lowers("update.adjoint")
def _adjoint(lowering: Lowering, part: Part) -> None:
    reads = [lowering.maybe(plane) for plane in part.reads]
    g = reads[1]
    assert g is not None
    *to_elements, dalpha, dhyper = part.writes
    writes = [lowering.new(plane) for plane in to_elements]
    rates = lowering.scratch(g.shape, g.memory.dtype) if dalpha != ABSENT else None
    wholes = _wholes(part.constants)
    _on_parameters(lowering, ScheduleOp.RULE_BACK, reads, [*writes, rates, lowering.new(dhyper)], wholes=wholes)
    if rates is not None:
        spread(lowering, dalpha, [rates])


def _norms(lowering: Lowering, pairs: list[tuple[View, View]], like: torch.dtype) -> View | None:
    """<a, b> of each pair in a vector."""
    if not pairs:
        return None
    vector = lowering.scratch((len(pairs),), like)
    for at, (a, b) in enumerate(pairs):
        inner(lowering, vector, at, a, b)
    return vector


@lowers("update.clip")
def _clip(lowering: Lowering, part: Part) -> None:
    hyper, *gs = map(lowering.maybe, part.reads)
    there = [g for g in gs if g is not None]
    out = lowering.new(part.writes[0])
    assert out is not None
    squares = _norms(lowering, [(g, g) for g in there], out.memory.dtype)
    lowering.emit(
        Instruction(
            ScheduleOp.CLIP_SCALE, 1, 1, (raw(hyper), raw(squares)), (raw(out),), wholes=(len(there),),
        )
    )  # fmt: skip


@lowers("update.unclip")
def _unclip(lowering: Lowering, part: Part) -> None:
    hyper, scale, *both = map(lowering.maybe, part.reads)
    assert scale is not None
    count = part.constants
    hs, gs = both[:count], both[count:]
    pairs = [(h, g) for h, g in zip(hs, gs, strict=True) if h is not None and g is not None]
    there = [g for g in gs if g is not None]
    dtype = scale.memory.dtype
    squares, inners = _norms(lowering, [(g, g) for g in there], dtype), _norms(lowering, pairs, dtype)
    along = lowering.scratch((), dtype)
    *vs, dhyper = part.writes
    reads = (raw(hyper), raw(scale), raw(squares), raw(inners))
    numbers = lowering.new(dhyper)
    lowering.emit(
        Instruction(
            ScheduleOp.CLIP_BACK, 1, 1, reads, (raw(along), raw(numbers)), wholes=(len(there), len(pairs)),
        )
    )  # fmt: skip
    for plane, h, g in zip(vs, hs, gs, strict=True):
        out = lowering.new(plane)
        if out is None:
            continue
        if h is None and g is None:
            lowering.copy(None, out)
        else:
            factors = [h, None if h is None else scale, g, None if g is None else along]
            lowering.elements(ScheduleOp.TWO_PRODUCTS, factors, [out])
