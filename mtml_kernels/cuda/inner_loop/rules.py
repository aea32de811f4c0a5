"""The parts of a schedule as instructions: layers on values, moves, sums over samples, updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mtml_kernels.cuda.inner_loop.instructions import Instruction, View
from mtml_kernels.cuda.inner_loop.lowering import (
    Lowering,
    Unsupported,
    factor_of,
    lowers,
    operand_of,
    reduction,
    turned,
)
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Activation, Linear, Shape, Span, Table

__all__: list[str] = []

Maybe = View | None


def _pairs(lowering: Lowering, *pairs: tuple[Maybe, Maybe]) -> list[tuple[View, View]]:
    return [(a, b) for a, b in pairs if a is not None and b is not None]


# --- linear layers ----------------------------------------------------------------------------------------------------


def _by_outputs(part: Part, w: Maybe) -> Maybe:
    """A weight as [I, O]."""
    given: Linear = part.constants
    return w if w is None or given.turned else turned(w)


def _product(lowering: Lowering, plane: int, pairs: Sequence[tuple[Maybe, Maybe]], bias: Maybe = None) -> None:
    """A result [N, R, F] of rows by matrices."""
    out = lowering.new(plane)
    if out is None:
        return
    found = [(lowering.with_rows(x), m) for x, m in pairs if x is not None and m is not None]
    rows = lowering.with_rows(out)
    for x, _ in found:
        if x.shape[0] != rows.shape[0]:
            raise Unsupported("a linear layer on values of fewer rows than its result")
    lowering.matmul(rows, found, found[0][1].shape[0] if found else 0, bias)


def _weight_gradient(lowering: Lowering, part: Part, plane: int, pairs: Sequence[tuple[Maybe, Maybe]]) -> None:
    """dw from pairs of (cotangent, value)."""
    out = lowering.new(plane)
    if out is None:
        return
    found = []
    for d, x in pairs:
        if d is not None and x is not None:
            left, right = (x, d) if part.constants.turned else (d, x)
            found.append((turned(lowering.with_rows(left)), lowering.with_rows(right)))
    lowering.matmul(out, found, found[0][1].shape[0] if found else 0)


def _bias_gradient(lowering: Lowering, plane: int, d: Maybe) -> None:
    out = lowering.new(plane)
    if out is None:
        return
    if d is None:
        lowering.copy(None, out)
        return
    full, _ = d.padded()
    kept = (1, 1, full[2])
    lowering.sum_of_products(out, kept, reduction(full, kept), [[factor_of(d, full, kept)]])


@lowers("linear.forward")
def _forward(lowering: Lowering, part: Part) -> None:
    x, w, b = map(lowering.maybe, part.reads)
    _product(lowering, part.writes[0], [(x, _by_outputs(part, w))], b)


@lowers("linear.tangent")
def _tangent(lowering: Lowering, part: Part) -> None:
    x, xt, w, wt, bt = map(lowering.maybe, part.reads)
    _product(lowering, part.writes[0], [(xt, _by_outputs(part, w)), (x, _by_outputs(part, wt))], bt)


@lowers("linear.backward")
def _backward(lowering: Lowering, part: Part) -> None:
    d, x, w = map(lowering.maybe, part.reads)
    m = _by_outputs(part, w)
    _product(lowering, part.writes[0], [(d, None if m is None else turned(m))])
    _weight_gradient(lowering, part, part.writes[1], [(d, x)])
    _bias_gradient(lowering, part.writes[2], d)


@lowers("linear.back_tangent")
def _back_tangent(lowering: Lowering, part: Part) -> None:
    d, dt, x, xt, w, wt = map(lowering.maybe, part.reads)
    m, mt = (None if v is None else turned(v) for v in (_by_outputs(part, w), _by_outputs(part, wt)))
    _product(lowering, part.writes[0], [(dt, m), (d, mt)])
    _weight_gradient(lowering, part, part.writes[1], [(dt, x), (d, xt)])
    _bias_gradient(lowering, part.writes[2], dt)


# --- activations ------------------------------------------------------------------------------------------------------


@lowers("act.forward", "act.backward", "act.tangent", "act.back_tangent")
def _activation(lowering: Lowering, part: Part) -> None:
    given: Activation = part.constants
    op = {
        "act.forward": ScheduleOp.ACT_FORWARD,
        "act.backward": ScheduleOp.ACT_BACKWARD,
        "act.tangent": ScheduleOp.ACT_BACKWARD,
        "act.back_tangent": ScheduleOp.ACT_TWICE,
    }[part.kernel]
    reads = [lowering.maybe(plane) for plane in part.reads]
    numbers = (float(given.c0), float(given.c1))
    lowering.elements(op, reads, [lowering.new(part.writes[0])], wholes=(int(given.kind),), reals=numbers)


# --- sums and products of elements ------------------------------------------------------------------------------------


@lowers("add.forward")
def _add(lowering: Lowering, part: Part) -> None:
    a, b = map(lowering.view, part.reads)
    add_to(lowering, a, b, lowering.new(part.writes[0]))


def add_to(lowering: Lowering, a: View, b: View, out: Maybe) -> None:
    numbers = int(a.memory.dtype == torch.float64)
    lowering.elements(ScheduleOp.ADDITION, [a, b], [out], wholes=(numbers,))


@lowers("accumulate")
def _accumulate(lowering: Lowering, part: Part) -> None:
    a, b = map(lowering.view, part.reads)
    if a.memory.home is not None or 0 in a.strides:  # of the caller's
        _add(lowering, part)
        return
    lowering.alias(part.writes[0], a)
    add_to(lowering, a, b, a)


def _multiply(lowering: Lowering, a: View, b: View, out: Maybe, c: float = 1.0) -> None:
    lowering.elements(ScheduleOp.MULTIPLICATION, [a, b], [out], reals=(c,))


@lowers("mul.forward", "scale")
def _mul(lowering: Lowering, part: Part) -> None:
    a, b = map(lowering.view, part.reads)
    _multiply(lowering, a, b, lowering.new(part.writes[0]))


@lowers("update.direction")
def _direction(lowering: Lowering, part: Part) -> None:
    lam, alpha = map(lowering.view, part.reads)
    _multiply(lowering, lam, alpha, lowering.new(part.writes[0]), -1.0)


@lowers("mul.tangent")
def _mul_tangent(lowering: Lowering, part: Part) -> None:
    a, at, b, bt = map(lowering.maybe, part.reads)
    lowering.elements(ScheduleOp.TWO_PRODUCTS, [at, b, a, bt], [lowering.new(part.writes[0])])


@lowers("mul.backward")
def _mul_backward(lowering: Lowering, part: Part) -> None:
    d, dt, b, bt = map(lowering.maybe, part.reads)
    out = lowering.new(part.writes[0])
    assert out is not None
    pairs = _pairs(lowering, (dt, b), (d, bt))
    full = _broadcast([view for pair in pairs for view in pair])
    _sum_to(lowering, out, full, [list(pair) for pair in pairs])


def _broadcast(views: Sequence[View]) -> tuple[int, int, int]:
    n, r, f = torch.broadcast_shapes(*(view.padded()[0] for view in views)) if views else (1, 1, 1)
    return n, r, f


def _sum_to(
    lowering: Lowering, out: View, full: tuple[int, int, int], terms: Sequence[Sequence[View]], scale: float = 1.0
) -> None:
    """out = scale sum of the products, over what it has not."""
    kept = out.padded()[0]
    n, r, f = (a if b == 1 else b for a, b in zip(full, kept, strict=True))
    factors = [[factor_of(view, (n, r, f), kept) for view in term] for term in terms]
    lowering.sum_of_products(out, kept, reduction((n, r, f), kept), factors, scale)


@lowers("reduce")
def _reduce(lowering: Lowering, part: Part) -> None:
    x, given = lowering.view(part.reads[0]), part.constants
    if len(given.shape) != len(lowering.planes[part.reads[0]].shape):
        raise Unsupported("a sum that drops dimensions")
    out = lowering.new(part.writes[0])
    assert out is not None
    _sum_to(lowering, out, x.padded()[0], [[x]])


@lowers("affine.forward")
def _affine(lowering: Lowering, part: Part) -> None:
    *_, c0, c1 = part.constants
    out = lowering.new(part.writes[0])
    assert out is not None
    lowering.copy(lowering.view(part.reads[0]), out, float(c0), float(c1))


# --- views and moves --------------------------------------------------------------------------------------------------


@lowers("view")
def _view(lowering: Lowering, part: Part) -> None:
    x, (plane,) = lowering.view(part.reads[0]), part.writes
    found = x.reshaped(lowering.shape(plane))
    if found is None:
        found = lowering.flat(x).reshaped(lowering.shape(plane))
        assert found is not None
    lowering.alias(plane, lowering.loaded(found))


@lowers("transpose")
def _transpose(lowering: Lowering, part: Part) -> None:
    x = lowering.view(part.reads[0])
    shape, strides = (*x.shape[:-2], x.shape[-1], x.shape[-2]), (*x.strides[:-2], x.strides[-1], x.strides[-2])
    lowering.alias(part.writes[0], dataclasses.replace(x, shape=shape, strides=strides))


@lowers("expand")
def _expand(lowering: Lowering, part: Part) -> None:
    x, shape = lowering.view(part.reads[0]), lowering.shape(part.writes[0])
    missing = len(shape) - len(x.shape)
    own, strides = (1,) * missing + x.shape, (0,) * missing + x.strides
    steps = tuple(0 if a == 1 else s for a, s in zip(own, strides, strict=True))
    lowering.alias(part.writes[0], dataclasses.replace(x, shape=shape, strides=steps))


@lowers("slice.forward")
def _slice(lowering: Lowering, part: Part) -> None:
    x, span = lowering.view(part.reads[0]), part.constants
    lowering.alias(part.writes[0], _features(x, span.start, span.stop))


def _features(x: View, start: int, stop: int) -> View:
    offset = x.offset + start * x.strides[-1]
    return dataclasses.replace(x, shape=(*x.shape[:-1], stop - start), offset=offset)


@lowers("slice.backward")
def _slice_backward(lowering: Lowering, part: Part) -> None:
    span: Span = part.constants
    out = lowering.new(part.writes[0])
    assert out is not None
    d = lowering.view(part.reads[0])
    spans = ((0, span.start, None), (span.start, span.stop, d), (span.stop, span.features, None))
    for start, stop, source in spans:
        if start < stop:
            lowering.copy(source, _features(out, start, stop))


@lowers("cat.forward")
def _cat(lowering: Lowering, part: Part) -> None:
    a, b = map(lowering.maybe, part.reads)
    out, absent = lowering.new(part.writes[0]), part.constants.shape[-1]
    assert out is not None
    first = absent if a is None else a.shape[-1]
    lowering.copy(a, _features(out, 0, first))
    lowering.copy(b, _features(out, first, out.shape[-1]))


@lowers("zeros")
def _zeros(lowering: Lowering, part: Part) -> None:
    out = lowering.new(part.writes[0])
    assert out is not None
    lowering.copy(None, out)


@lowers("stack")
def _stack(lowering: Lowering, part: Part) -> None:
    lowering.stacked[part.writes[0]] = list(part.reads)


@lowers("tasks.sum")
def _tasks_sum(lowering: Lowering, part: Part) -> None:
    x, (plane,) = lowering.view(part.reads[0]), part.writes
    if lowering.is_last_reader(part.reads[0]) and x.memory.home is None:
        lowering.alias(plane, x)
        return
    out = lowering.new(plane)
    assert out is not None
    lowering.copy(x, out)


# --- embeddings -------------------------------------------------------------------------------------------------------


@lowers("embedding.forward", "embedding.tangent")
def _look_up(lowering: Lowering, part: Part) -> None:
    ids, w = map(lowering.view, part.reads)
    given: Table = part.constants
    padding = given.padding if part.kernel == "embedding.tangent" else -1
    out = lowering.new(part.writes[0])
    assert out is not None
    (n, r, f), _ = out.padded()
    table = operand_of(dataclasses.replace(w, shape=(w.shape[-1],), strides=(w.strides[-1],)), (n, r, f))
    assert table is not None
    rows = dataclasses.replace(ids, shape=(*ids.shape, 1), strides=(*ids.strides, 0))
    reads = (operand_of(rows, (n, r, f)), table._replace(r=w.strides[-2]))
    lowering.emit(
        Instruction(
            ScheduleOp.LOOK_UP, n * r, f, reads, (operand_of(out, (n, r, f)),), sample=r,
            wholes=(padding, w.shape[-2]),
        )
    )  # fmt: skip


@lowers("embedding.backward")
def _add_up(lowering: Lowering, part: Part) -> None:
    d, ids = map(lowering.view, part.reads)
    given: Table = part.constants
    out = lowering.new(part.writes[0])
    assert out is not None
    (n, r, f), _ = d.padded()
    rows = dataclasses.replace(ids, shape=(*ids.shape, 1), strides=(*ids.strides, 0))
    reads = (operand_of(d, (n, r, f)), operand_of(rows, (n, r, f)))
    table = out.shape[0]
    lowering.emit(
        Instruction(
            ScheduleOp.ADD_UP_BY_ID, table, f, reads, (operand_of(out, (1, table, f)),), sample=table,
            wholes=(given.padding, n * r, r),
        )
    )  # fmt: skip


# --- updates ----------------------------------------------------------------------------------------------------------


@lowers("update.step")
def _step(lowering: Lowering, part: Part) -> None:
    reads = [lowering.view(plane) for plane in part.reads]
    lowering.elements(ScheduleOp.GRADIENT_STEP, reads, [lowering.new(part.writes[0])])


@lowers("update.rate")
def _rate(lowering: Lowering, part: Part) -> None:
    g, lam = map(lowering.view, part.reads)
    given: Shape = part.constants
    out = lowering.new(part.writes[0])
    assert out is not None
    if len(given.shape) not in (0, 3):
        raise Unsupported(f"rates of shape {given.shape}")
    _sum_to(lowering, out, g.padded()[0], [[g, lam]], -1.0)


def spread(lowering: Lowering, plane: int, term: Sequence[View]) -> None:
    """A result of the shape of what is broadcast, summed over the rest."""
    out = lowering.new(plane)
    if out is not None:
        _sum_to(lowering, out, term[0].padded()[0], [term])


def inner(lowering: Lowering, vector: View, at: int, a: View, b: View) -> None:
    """vector[at] = <a, b>"""
    one = dataclasses.replace(vector, shape=(1,), strides=(1,), offset=vector.offset + at)
    full = a.padded()[0]
    factors = [factor_of(view, full, (1, 1, 1)) for view in (a, b)]
    lowering.sum_of_products(one, (1, 1, 1), full, [factors])
