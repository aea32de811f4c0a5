"""Linear layers, convolutions, and embeddings (a product with rows of the unit matrix)."""

from __future__ import annotations

from typing import Any

from mtml_kernels.program.encoding import LAYOUT_IN_OUT
from mtml_kernels.program.ops import Op
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.kernels import Convolution, Linear, Shape, Table
from mtml_kernels.schedule.passes import Along, NodeRule, Pass, Pull, node_rule

__all__: list[str] = []


def _constants(p: Pass, i: int, over_tasks: bool) -> Any:
    node = p.node(i)
    if node.op == Op.CONV:
        return Convolution(p.constants(i), over_tasks)
    stored_in_out = p.program.params[node.weight][0] == LAYOUT_IN_OUT
    return Linear(stored_in_out != (node.op == Op.LINEAR_TRANSPOSED), over_tasks)


def _family(p: Pass, i: int) -> str:
    return "conv" if p.node(i).op == Op.CONV else "linear"


def _forward(p: Pass, i: int) -> int:
    x, w, b = p.values[p.node(i).a], p.weight(i), p.bias(i)
    shape = p.shape(i, p.lead(x, w, b))
    return p.draft.one(f"{_family(p, i)}.forward", (x, w, b), shape, f"value of node {i}", _constants(p, i, False))


def _tangent(p: Pass, i: int, along: Along) -> int:
    node = p.node(i)
    x, w, xt = p.values[node.a], p.weight(i), along.values[node.a]
    wt = along.directions[node.weight]
    bt = along.directions[node.bias] if node.bias >= 0 else ABSENT
    if xt == wt == bt == ABSENT:
        return ABSENT
    w = w if xt != ABSENT else ABSENT  # what is read stays in memory: not the weights of a layer on the input itself
    shape = p.shape(i, p.lead(x, w, xt, wt, bt))
    name = f"{_family(p, i)}.tangent"
    return p.draft.one(name, (x, xt, w, wt, bt), shape, f"tangent of node {i}", _constants(p, i, False))


def _pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    node, family = p.node(i), _family(p, i)
    of_w, of_b, over = pull.of_params()
    x, xt = (p.values[node.a], pull.tangent(node.a)) if of_w else (ABSENT, ABSENT)
    w, wt = (p.weight(i), pull.direction(node.weight)) if pull.wanted[0] else (ABSENT, ABSENT)
    d = pull.d
    if d == ABSENT:
        xt = wt = ABSENT
    lead = 1 if over else p.lead(pull.dt, d, xt)
    rows, cols = p.draft.shape(p.weight(i))[1:]
    shapes = (
        p.shape(node.a, p.lead(pull.dt, d, wt)) if pull.wanted[0] else None,
        (lead, rows, cols) if of_w else None,
        (lead, 1, node.features) if of_b else None,
    )
    if all(shape is None for shape in shapes):
        return [ABSENT]
    draft, constants = p.draft, _constants(p, i, over)
    dtypes = [draft.dtype, draft.wide, draft.wide]
    if xt == wt == ABSENT:
        found = draft.emit(f"{family}.backward", (pull.dt, x, w), shapes, f"gradient of node {i}", constants, dtypes)
    else:
        reads = (d, pull.dt, x, xt, w, wt)
        found = draft.emit(f"{family}.back_tangent", reads, shapes, f"along V, of node {i}", constants, dtypes)
    pull.hand_over(draft.own(found[1]), found[2])
    return [found[0]]


def _ids(p: Pass, i: int) -> int:
    """The ids that an embedding reads, [T, N, rows]."""
    ids = p.inputs[p.node(i).a]
    shape = (*p.draft.shape(ids)[:2], p.node(i).rows)
    if p.draft.shape(ids) == shape:
        return ids
    return p.draft.emit("view", (ids,), [shape], "ids in rows", Shape(shape), [p.draft.planes[ids].dtype])[0]


def _looked_up(p: Pass, i: int, kernel: str, table: int, name: str) -> int:
    padding = int(p.constants(i)[0])
    return p.draft.one(kernel, (_ids(p, i), table), p.shape(i), name, _table(p, i, padding, False))


def _table(p: Pass, i: int, padding: int, over_tasks: bool) -> Table:
    return Table(padding, p.program.params[p.node(i).weight][1], over_tasks)


def _embedding_tangent(p: Pass, i: int, along: Along) -> int:
    wt = along.directions[p.node(i).weight]
    return ABSENT if wt == ABSENT else _looked_up(p, i, "embedding.tangent", wt, f"tangent of node {i}")


def _embedding_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    of_w, _, over = pull.of_params()
    if of_w:
        rows, cols = p.draft.shape(p.weight(i))[1:]
        lead = 1 if over else p.tasks
        constants = _table(p, i, int(p.constants(i)[0]), over)
        reads, shapes = (pull.dt, _ids(p, i)), [(lead, rows, cols)]
        found = p.draft.emit("embedding.backward", reads, shapes, f"gradient of node {i}", constants, [p.draft.wide])
        pull.hand_over(p.draft.own(found[0]), ABSENT)
    return []


for _op in (Op.LINEAR, Op.LINEAR_TRANSPOSED, Op.CONV):
    node_rule(_op, NodeRule(_forward, _tangent, _pull))
node_rule(
    Op.EMBEDDING,
    NodeRule(
        lambda p, i: _looked_up(p, i, "embedding.forward", p.weight(i), f"value of node {i}"),
        _embedding_tangent,
        _embedding_pull,
    ),
)
