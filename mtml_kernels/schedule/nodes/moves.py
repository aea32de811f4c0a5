"""Inputs, parameters, and operations that change only where elements lie."""

from __future__ import annotations

import torch

from mtml_kernels.program.encoding import LAYOUT_IN_OUT
from mtml_kernels.program.layers.slicing import SLICE
from mtml_kernels.program.ops import Op
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.kernels import Shape, Span
from mtml_kernels.schedule.nodes.pointwise import reduced
from mtml_kernels.schedule.passes import Along, NodeRule, Pass, Pull, node_rule

__all__: list[str] = []


def _viewed(p: Pass, x: int, shape: tuple[int, ...], name: str) -> int:
    return (
        x if p.draft.shape(x) == shape else p.draft.emit("view", (x,), [shape], name, Shape(shape), [_dtype(p, x)])[0]
    )


def _dtype(p: Pass, x: int) -> torch.dtype:
    return p.draft.planes[x].dtype


# --- leaves -----------------------------------------------------------------------------------------------------------


def _input(p: Pass, i: int) -> int:
    return _viewed(p, p.inputs[p.node(i).a], p.shape(i), f"value of node {i}")


def _input_pull(pull: Pull) -> list[int]:
    pull.sink.take_input(pull.on.node(pull.i).a, pull.dt)
    return []


def _as_value(p: Pass, i: int, matrix: int, name: str) -> int:
    """A parameter [L, rows, cols] as the value of a node."""
    turned = p.program.params[p.node(i).weight][0] == LAYOUT_IN_OUT
    lead, rows, cols = p.draft.shape(matrix)
    if turned:
        matrix = p.draft.emit("transpose", (matrix,), [(lead, cols, rows)], name, None, [_dtype(p, matrix)])[0]
    return _viewed(p, matrix, p.shape(i, lead), name)


def _param_tangent(p: Pass, i: int, along: Along) -> int:
    direction = along.directions[p.node(i).weight]
    return ABSENT if direction == ABSENT else _as_value(p, i, direction, f"tangent of node {i}")


def _param_pull(pull: Pull) -> list[int]:
    p, node = pull.on, pull.on.node(pull.i)
    layout, rows, cols = p.program.params[node.weight]
    lead = p.draft.shape(pull.dt)[0]
    found = _viewed(p, pull.dt, (lead, rows, cols), f"gradient of parameter {node.weight}")
    if layout == LAYOUT_IN_OUT:
        found = p.draft.emit(
            "transpose", (found,), [(lead, cols, rows)], "stored as [in, out]", None, [_dtype(p, found)]
        )[0]
    pull.hand_over(found, ABSENT)
    return []


node_rule(Op.INPUT, NodeRule(_input, lambda p, i, along: ABSENT, _input_pull))
node_rule(
    Op.PARAM,
    NodeRule(lambda p, i: _as_value(p, i, p.weight(i), f"value of node {i}"), _param_tangent, _param_pull),
)


# --- the same elements in another shape -------------------------------------------------------------------------------


def _moved(p: Pass, i: int, x: int, name: str) -> int:
    """VIEW, TRANSPOSE, EXPAND of a value or a tangent."""
    op, lead = p.node(i).op, p.lead(x)
    shape = p.shape(i, lead)
    if op == Op.TRANSPOSE:
        return p.draft.one("transpose", (x,), shape, name)
    if op == Op.EXPAND:
        return p.draft.one("expand", (x,), shape, name, Shape(shape))
    return _viewed(p, x, shape, name)


def _moved_tangent(p: Pass, i: int, along: Along) -> int:
    xt = along.values[p.node(i).a]
    return ABSENT if xt == ABSENT else _moved(p, i, xt, f"tangent of node {i}")


def _moved_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    op, shape = p.node(i).op, p.shape(p.node(i).a, p.lead(pull.dt))
    if op == Op.TRANSPOSE:
        return [p.draft.one("transpose", (pull.dt,), shape, f"gradient of node {i}")]
    return [reduced(p, pull.dt, shape) if op == Op.EXPAND else _viewed(p, pull.dt, shape, f"gradient of node {i}")]


for _op in (Op.VIEW, Op.TRANSPOSE, Op.EXPAND):
    node_rule(
        _op,
        NodeRule(lambda p, i: _moved(p, i, p.values[p.node(i).a], f"value of node {i}"), _moved_tangent, _moved_pull),
    )


# --- parts and joins of features --------------------------------------------------------------------------------------


def _span(p: Pass, i: int) -> Span:
    start, stop = (int(c) for c in p.constants(i))
    return Span(start, stop, p.node(p.node(i).a).features)


def _sliced(p: Pass, i: int, x: int, name: str) -> int:
    return p.draft.one("slice.forward", (x,), p.shape(i, p.lead(x)), name, _span(p, i))


def _slice_tangent(p: Pass, i: int, along: Along) -> int:
    xt = along.values[p.node(i).a]
    return ABSENT if xt == ABSENT else _sliced(p, i, xt, f"tangent of node {i}")


def _slice_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    shape = p.shape(p.node(i).a, p.lead(pull.dt))
    return [p.draft.one("slice.backward", (pull.dt,), shape, f"gradient of node {i}", _span(p, i))]


def _joined(p: Pass, i: int, a: int, b: int, name: str) -> int:
    """Features of a, then of b; in the place of an absent one zeros of its features."""
    shape = p.shape(i, p.lead(a, b))
    absent = p.node(p.node(i).operands()[0 if a == ABSENT else 1]).features
    return p.draft.one("cat.forward", (a, b), shape, name, Shape((*shape[:-1], absent)))


def _cat_tangent(p: Pass, i: int, along: Along) -> int:
    a, b = (along.values[j] for j in p.node(i).operands())
    return ABSENT if a == b == ABSENT else _joined(p, i, a, b, f"tangent of node {i}")


def _cat_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    features, start, found = p.node(i).features, 0, []
    for j, want in zip(p.node(i).operands(), pull.wanted, strict=True):
        stop = start + p.node(j).features
        shape = (*p.draft.shape(pull.dt)[:-1], stop - start)
        name = f"gradient of node {i}"
        part = p.draft.one("slice.forward", (pull.dt,), shape, name, Span(start, stop, features)) if want else ABSENT
        found.append(part)
        start = stop
    return found


node_rule(
    SLICE,
    NodeRule(lambda p, i: _sliced(p, i, p.values[p.node(i).a], f"value of node {i}"), _slice_tangent, _slice_pull),
)


def _cat(p: Pass, i: int) -> int:
    a, b = (p.values[j] for j in p.node(i).operands())
    return _joined(p, i, a, b, f"value of node {i}")


node_rule(Op.CAT, NodeRule(_cat, _cat_tangent, _cat_pull))
