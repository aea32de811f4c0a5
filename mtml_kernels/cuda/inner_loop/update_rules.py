"""Update rules and clipping as instructions: a step of each tensor, its adjoint, the norm of a task's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from mtml_kernels.cuda.inner_loop.instructions import Instruction, Operand, View
from mtml_kernels.cuda.inner_loop.lowering import Lowering, lowers, operand_of
from mtml_kernels.cuda.inner_loop.rules import add_to, inner, spread
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.schedule.call import ABSENT, Part, by_tensor
from mtml_kernels.schedule.kernels import KERNELS, Rule
from mtml_kernels.schema.update import HYPERS, RULES, UpdateSpec

__all__: list[str] = []

Item = TypeVar("Item")


def _wholes(rule: Rule) -> tuple[int, int, int]:
    return RULES.index(rule.spec.rule), flags_of(rule.spec), rule.step


def flags_of(spec: UpdateSpec) -> int:
    """`enum UpdateFlag` of csrc/include/mtml/update.h."""
    return int(spec.encode()[1])


def _of_tensors(items: Sequence[Item], kernel: str, results: bool = False) -> list[tuple[Item, ...]]:
    """What a part reads or writes of several tensors, less the numbers, which come last: a tuple each."""
    roles = KERNELS[kernel].writes if results else KERNELS[kernel].reads
    return by_tensor(items, sum(role.endswith("*") for role in roles))


@lowers("update.rule")
def _rule(lowering: Lowering, part: Part) -> None:
    *reads, hyper = map(lowering.maybe, part.reads)
    wholes, planes = _wholes(part.constants), _of_tensors(part.writes, part.kernel, results=True)
    for own, results in zip(_of_tensors(reads, part.kernel), planes, strict=True):
        operands = [*own[:3], hyper, *own[3:]]
        _on_parameters(lowering, ScheduleOp.RULE_STEP, operands, [lowering.new(r) for r in results], wholes=wholes)


def _on_parameters(
    lowering: Lowering, op: ScheduleOp, reads: list[View | None], writes: list[View | None], **more: Any
) -> None:
    """`elements`, but for the numbers, which are read as they lie."""
    _, r, f = space = next(view for view in reads[1:2] if view is not None).padded()[0]
    operands = [raw(view) if i == 3 else operand_of(view, space) for i, view in enumerate(reads)]
    results = [raw(v) if v is not None and v.shape == (len(HYPERS),) else operand_of(v, space) for v in writes]
    lowering.emit(Instruction(op, space[0] * r, f, tuple(operands), tuple(results), sample=r, **more))


def raw(view: View | None) -> Operand | None:
    """What an instruction addresses itself."""
    return None if view is None else Operand(view.memory, view.offset, 0, 0, 0, 0)


@lowers("update.adjoint")
def _adjoint(lowering: Lowering, part: Part) -> None:
    *reads, hyper = map(lowering.maybe, part.reads)
    *planes, dhyper = part.writes
    shares: list[View] = []  # of each tensor, of what flows to the numbers
    for own, results in zip(
        _of_tensors(reads, part.kernel), _of_tensors(planes, part.kernel, results=True), strict=True
    ):
        if dhyper != ABSENT:
            shares.append(lowering.scratch((len(HYPERS),), torch.float64))
        operands = [*own[:3], hyper, *own[3:]]
        _adjoint_of_one(lowering, operands, results, shares[-1] if shares else None, _wholes(part.constants))
    if shares:
        lowering.alias(dhyper, shares[0])
        for share in shares[1:]:
            add_to(lowering, shares[0], share, shares[0])


def _adjoint_of_one(
    lowering: Lowering,
    operands: list[View | None],
    results: Sequence[int],
    to_hyper: View | None,
    wholes: tuple[int, int, int],
) -> None:
    *to_elements, dalpha = results
    writes, g = [lowering.new(plane) for plane in to_elements], operands[1]
    assert g is not None
    rates = lowering.scratch(g.shape, g.memory.dtype) if dalpha != ABSENT else None
    _on_parameters(lowering, ScheduleOp.RULE_BACK, operands, [*writes, rates, to_hyper], wholes=wholes)
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
    scale, *clipped = map(lowering.new, part.writes)
    like = there[0].memory.dtype
    scale = lowering.scratch((), like) if scale is None else scale
    squares = _norms(lowering, [(g, g) for g in there], like)
    lowering.emit(
        Instruction(
            ScheduleOp.CLIP_SCALE, 1, 1, (raw(hyper), raw(squares)), (raw(scale),), wholes=(len(there),),
        )
    )  # fmt: skip
    for g, out in zip(gs, clipped, strict=True):
        if out is not None:
            lowering.elements(ScheduleOp.MULTIPLICATION, [g, scale], [out], reals=(1.0,))


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
