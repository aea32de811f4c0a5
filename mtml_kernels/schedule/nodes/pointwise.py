"""Activations, sums and products of elements, affine functions."""

from __future__ import annotations

from mtml_kernels.program.ops import Op
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Dims
from mtml_kernels.schedule.kernels import BENT, FROM_OUTPUT, Activation, Shape
from mtml_kernels.schedule.passes import Along, NodeRule, Pass, Pull, node_rule

__all__ = ["reduced"]


# --- activations ------------------------------------------------------------------------------------------------------


def _act(p: Pass, i: int) -> Activation:
    c0, c1 = p.constants(i) or (1.0, 0.0)
    return Activation(p.node(i).b, c0, c1)


def _ref(p: Pass, i: int) -> int:
    """What the derivatives are taken from: the value where that is enough, else the argument."""
    return p.values[i if p.node(i).b in FROM_OUTPUT else p.node(i).a]


def _act_forward(p: Pass, i: int) -> int:
    x = p.values[p.node(i).a]
    return p.draft.one("act.forward", (x,), p.shape(i, p.lead(x)), f"value of node {i}", _act(p, i))


def _act_tangent(p: Pass, i: int, along: Along) -> int:
    xt, ref = along.values[p.node(i).a], _ref(p, i)
    if xt == ABSENT:
        return ABSENT
    return p.draft.one("act.tangent", (xt, ref), p.shape(i, p.lead(xt, ref)), f"tangent of node {i}", _act(p, i))


def _act_pull(pull: Pull) -> list[int]:
    p, i = pull.on, pull.i
    ref, d, xt = _ref(p, i), pull.d, pull.tangent(p.node(i).a)
    if xt == ABSENT or d == ABSENT or p.node(i).b not in BENT:
        shape = p.shape(i, p.lead(pull.dt, ref))
        return [p.draft.one("act.backward", (pull.dt, ref), shape, f"gradient of node {i}", _act(p, i))]
    shape = p.shape(i, p.lead(pull.dt, d, ref, xt))
    return [p.draft.one("act.back_tangent", (d, pull.dt, ref, xt), shape, f"along V, of node {i}", _act(p, i))]


# --- what broadcasts --------------------------------------------------------------------------------------------------


def reduced(p: Pass, plane: int, shape: Dims) -> int:
    """A cotangent summed over what an operand of this shape was broadcast to; tasks stay apart."""
    lead = p.draft.shape(plane)[0]
    if p.draft.shape(plane) == (lead, *shape[1:]):
        return plane
    return p.draft.one(
        "reduce", (plane,), (lead, *shape[1:]), "summed over what was broadcast", Shape((lead, *shape[1:]))
    )


def _operands(p: Pass, i: int) -> tuple[int, int]:
    a, b = p.node(i).operands()
    return a, b


def _add_forward(p: Pass, i: int) -> int:
    a, b = (p.values[j] for j in _operands(p, i))
    return p.draft.one("add.forward", (a, b), p.shape(i, p.lead(a, b)), f"value of node {i}")


def _add_tangent(p: Pass, i: int, along: Along) -> int:
    a, b = (along.values[j] for j in _operands(p, i))
    if a == b == ABSENT:
        return ABSENT
    shape = p.shape(i, p.lead(a, b))
    if ABSENT not in (a, b):
        return p.draft.one("add.forward", (a, b), shape, f"tangent of node {i}")
    only = b if a == ABSENT else a
    if p.draft.shape(only) == shape:
        return only
    return p.draft.one("expand", (only,), shape, f"tangent of node {i}", Shape(shape))


def _add_pull(pull: Pull) -> list[int]:
    p = pull.on
    return [
        reduced(p, pull.dt, p.shape(j)) if want else ABSENT
        for j, want in zip(_operands(p, pull.i), pull.wanted, strict=True)
    ]


def _mul_forward(p: Pass, i: int) -> int:
    a, b = (p.values[j] for j in _operands(p, i))
    return p.draft.one("mul.forward", (a, b), p.shape(i, p.lead(a, b)), f"value of node {i}")


def _mul_tangent(p: Pass, i: int, along: Along) -> int:
    j, k = _operands(p, i)
    reads = (p.values[j], along.values[j], p.values[k], along.values[k])
    if reads[1] == reads[3] == ABSENT:
        return ABSENT
    return p.draft.one("mul.tangent", reads, p.shape(i, p.lead(*reads)), f"tangent of node {i}")


def _mul_pull(pull: Pull) -> list[int]:
    j, k = _operands(pull.on, pull.i)
    pairs = ((j, k, pull.wanted[0]), (k, j, pull.wanted[1]))
    return [_of_factor(pull, own, other) if want else ABSENT for own, other, want in pairs]


def _of_factor(pull: Pull, own: int, other: int) -> int:
    p, bt = pull.on, pull.tangent(other)
    d = pull.d if bt != ABSENT else ABSENT
    reads = (d, pull.dt, p.values[other], bt if d != ABSENT else ABSENT)
    shape = p.shape(own, p.lead(*reads))
    return p.draft.one("mul.backward", reads, shape, f"gradient of node {pull.i}", Shape(shape))


def _affine(p: Pass, i: int, x: int, name: str, shift: bool) -> int:
    c0, c1 = p.constants(i)
    constants = (c0, c1 if shift else 0.0)
    return p.draft.one("affine.forward", (x,), p.draft.shape(x), name, constants)


def _affine_tangent(p: Pass, i: int, along: Along) -> int:
    xt = along.values[p.node(i).a]
    return ABSENT if xt == ABSENT else _affine(p, i, xt, f"tangent of node {i}", shift=False)


node_rule(Op.ACT, NodeRule(_act_forward, _act_tangent, _act_pull))
node_rule(Op.ADD, NodeRule(_add_forward, _add_tangent, _add_pull))
node_rule(Op.MUL, NodeRule(_mul_forward, _mul_tangent, _mul_pull))
node_rule(
    Op.AFFINE,
    NodeRule(
        lambda p, i: _affine(p, i, p.values[p.node(i).a], f"value of node {i}", shift=True),
        _affine_tangent,
        lambda pull: [_affine(pull.on, pull.i, pull.dt, f"gradient of node {pull.i}", shift=False)],
    ),
)
