"""A layer program in two: a trunk that no inner step changes, and the adapted linear layer on its features.

Where that layer is the last one, each inner step sees the same features again, batch statistics included. The trunk can
then run once, and the inner loop of the layer alone gives the same results and gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from mtml_kernels.program.encoding import LAYOUT_STEPS, InputInfo, Node, ParamInfo, Program, constants_of, op_name
from mtml_kernels.program.ops import OPS, Op

__all__ = ["Parts", "mixes_samples", "once_is_dearer", "split_head"]

FEATURES = "features"  # what the head's program calls its input


class Parts(NamedTuple):
    """`head` computes on the trunk's output what the whole program computes on its inputs.

    `joint`: the trunk treats every sample by itself, so that two sets may run together; batch statistics not.
    """

    trunk: Program
    head: Program
    joint: bool


def split_head(program: Program, adapted: Sequence[bool]) -> Parts | str:
    """The two parts, or why the layers before the adapted ones cannot run once ("" where there are none).

    Args:
        adapted: one flag per parameter of the program: does the inner loop change it?
    """
    users = [i for i, node in enumerate(program.nodes) if any(adapted[p] for p in _read(node))]
    at = users[0]
    if not any(map(_read, program.nodes[:at])):  # no layer that learns comes first, so that there is nothing to save
        return ""
    if len(users) > 1:
        return _too_many(program, users)
    if program.nodes[at].op != Op.LINEAR:
        return f"{_called(program, at)} is adapted and is no linear layer"
    last = program.output
    while program.nodes[last].op == Op.VIEW:
        last = program.nodes[last].a
    if last != at:
        return f"{_called(program, last)} comes after the adapted layer"
    for i, node in enumerate(program.nodes[:at]):
        if any(program.params[p].layout == LAYOUT_STEPS for p in _read(node)):
            return f"{_called(program, i)} reads a row of its own in every step"
    # every node is needed for the output, so what stands before the layer is needed for its operand
    return Parts(_trunk(program, at), _head(program, at), not mixes_samples(program.nodes[:at]))


def _read(node: Node) -> list[int]:
    return [p for p in (node.weight, node.bias) if p >= 0]


def mixes_samples(nodes: Sequence[Node]) -> bool:
    """Whether a sample's value depends on those beside it, as with batch statistics."""
    return any(node.b in OPS[node.op].mixing for node in nodes)


def _called(program: Program, i: int) -> str:
    node = program.nodes[i]
    name = op_name(node, constants_of(node, program.consts))
    return f"{program.paths[i]} ({name})" if program.paths else f"node {i} ({name})"


def _too_many(program: Program, users: Sequence[int]) -> str:
    read = [set(_read(program.nodes[i])) for i in users]
    names = ", ".join(_called(program, i) for i in users[:3]) + (", ..." if len(users) > 3 else "")
    twice = set.intersection(*read)
    return f"the adapted layer is used more than once: {names}" if twice else f"several layers are adapted: {names}"


def _trunk(program: Program, at: int) -> Program:
    features = program.nodes[program.nodes[at].a]
    nodes, params = _with_own_params(program, program.nodes[:at])
    names = {param.name for param in params}
    return dataclasses.replace(
        program,
        nodes=nodes,
        params=params,
        output=program.nodes[at].a,
        output_shape=(features.rows, features.features),
        paths=(),
        statistics=tuple(name for name in program.statistics if name in names),
    )


def _head(program: Program, at: int) -> Program:
    """The layer on an input, and the views after it."""
    features = program.nodes[program.nodes[at].a]
    tail = [dataclasses.replace(node, a=node.a - at + 1) for node in program.nodes[at + 1 :]]
    layer = dataclasses.replace(program.nodes[at], a=0)
    source = Node(Op.INPUT, a=0, rows=features.rows, features=features.features)
    nodes, params = _with_own_params(program, [source, layer, *tail])
    return Program(
        nodes=nodes,
        params=params,
        inputs=(InputInfo(FEATURES, (features.rows, features.features)),),
        output=program.output - at + 1,
        output_shape=program.output_shape,
    )


def _with_own_params(program: Program, nodes: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[ParamInfo, ...]]:
    """The nodes, and the parameters that they read, in the program's order."""
    kept = sorted({p for node in nodes for p in _read(node)})
    place = {old: new for new, old in enumerate(kept)} | {-1: -1}
    moved = (dataclasses.replace(node, weight=place[node.weight], bias=place[node.bias]) for node in nodes)
    return tuple(moved), tuple(program.params[p] for p in kept)


def once_is_dearer(trunk: Program, support: int, query: int, steps: int, first_order: bool) -> str:
    """Why the trunk should run in every step ("" where it should run once): the cost model, one task's multiply-adds.

    With S, Q samples, K steps and P products of the trunk for a sample. In every step: forward on S samples, and in
    second order the two products of the way back; forward and backward on Q. Once: forward on S + Q samples, and in the
    backward pass, which is the first to know a cotangent, forward again and backward. A pass over everything finds
    nothing of a task in cache (`ONCE`), and is a second call of the engine (`CALL`).

    Measured (one thread, AVX2, float32; meta-loss and all gradients; P 64 to 27 M, S 5 and 25, Q 15 and 75, K 1 to 10,
    59 cases): the slower way is chosen in 4, by 19 % in one and by 5 % at most in the others. Two threads gave much the
    same ratios. Time of running once over that of running in every step, S = 5, Q = 15:

        trunk                                          K = 1   K = 3   K = 5   K = 10
        MLP 784-256-64                                  1.39    0.97    0.78    0.50
        4 x conv 32, relu, max-pool, images 3 x 84 x 84 1.36    0.87    0.76    0.38
        3 x conv 32 stride 2, relu, images 28 x 28      1.34    0.90    0.76    0.41
        MLP 1-40-40 (the whole meta-step is 1 ms)       1.96    1.39    1.40    0.84
    """
    convolutions = any(node.op == Op.CONV for node in trunk.nodes)
    every = (steps * (1 if first_order else 3) * support + 3 * query) * _products(trunk)
    once = (ONCE_CONV if convolutions else ONCE) * (support + query) * _products(trunk)
    if once + CALL <= every:
        return ""
    return f"that is cheaper at {support} support and {query} query samples, {steps} step{'' if steps == 1 else 's'}"


# A sample that runs once takes 4 products; a second call takes the time of so many multiply-adds for every task.
ONCE, ONCE_CONV, CALL = 5, 4, 300_000


def _products(program: Program) -> int:
    """Multiply-adds of one forward pass over one sample."""
    return sum(
        node.rows * node.features * _inputs(program.params[node.weight], node.op)
        for node in program.nodes
        if node.op in (Op.LINEAR, Op.LINEAR_TRANSPOSED, Op.CONV)
    )


def _inputs(weight: ParamInfo, op: int) -> int:
    """What an output sums over."""
    return weight.rows if op == Op.LINEAR_TRANSPOSED else weight.cols
