"""The four passes over one set at one theta: values, cotangents, tangents, and tangents of the cotangents.

    values      y_i = f_i(operands, w)
    pull        d of every operand and parameter from the d of y, or, along a direction V of the parameters,
                dt of them from d and dt of y (kernels.py has both for each operation)
    tangents    yt_i along V
A node takes part in `pull` where what is asked for depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mtml_kernels.program.encoding import Encoded, Node, constants_of
from mtml_kernels.program.ops import OPS
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Dims, Draft

__all__ = ["NODES", "Along", "NodeRule", "Pass", "Sink", "depends", "node_rule", "used_nodes"]


class Sink(Protocol):
    """Who takes the gradients of a `pull`."""

    over_tasks: frozenset[int]  # parameters whose gradient is summed over tasks right away

    def wants(self, param: int) -> bool:
        """Whether that parameter's gradient is wanted."""
        ...

    def take(self, param: int, plane: int) -> None:
        """One reader's gradient of a parameter, [T or 1, rows, cols]."""
        ...

    def take_input(self, index: int, plane: int) -> None:
        """The cotangent of an input, as one node sees it [T, N, rows, features]."""
        ...


@dataclasses.dataclass
class Along:
    """A direction of the parameters and the tangents of all values along it; ABSENT for zeros."""

    directions: Sequence[int]
    values: list[int] = dataclasses.field(default_factory=list)
    kept: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # by node: what its pull reads


@dataclasses.dataclass
class Pass:
    """One set at theta: its planes of values, and after `pull` of cotangents."""

    draft: Draft
    program: Encoded
    consts: Sequence[float]
    tasks: int
    samples: int
    theta: Sequence[int]  # planes of the parameters
    inputs: Sequence[int]  # [T, N, ...] as the caller has them
    rows: Mapping[int, int]  # of parameters with a row for every step: the one that this pass reads
    values: list[int] = dataclasses.field(default_factory=list)
    kept: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # by node: what derivatives need
    cotangents: list[int] = dataclasses.field(default_factory=list)
    sums: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # by node: of a normalisation's pull

    # --- the passes -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """All values; returns the output's plane."""
        self.values = [ABSENT] * len(self.program.nodes)
        for i in used_nodes(self.program):
            self.values[i] = NODES[self.program.nodes[i].op].forward(self, i)
        return self.values[self.program.output]

    def run_along(self, directions: Sequence[int]) -> Along:
        """The tangents of all values."""
        along = Along(directions, [ABSENT] * len(self.values))
        for i in used_nodes(self.program):
            along.values[i] = NODES[self.program.nodes[i].op].tangent(self, i, along)
        return along

    def pull(self, seed: int, sink: Sink, along: Along | None = None, keep: bool = False) -> None:
        """Gradients to the sink from the cotangent of the output, or, along a direction, from that one's tangent.

        keep: the cotangents stay, for a later pull along a direction.
        """
        asked = depends(self.program, sink.wants, wants_inputs=bool(getattr(sink, "inputs", False)))
        found = [ABSENT] * len(self.values)
        found[self.program.output] = seed
        if keep:
            self.cotangents = found
        for i in reversed(used_nodes(self.program)):
            if asked[i] and found[i] != ABSENT:
                wanted = [asked[j] for j in self.program.nodes[i].operands()]
                arrived = self.draft.share(found[i])
                pulled = NODES[self.program.nodes[i].op].pull(Pull(self, i, arrived, along, sink, wanted, keep))
                for j, want, plane in zip(self.program.nodes[i].operands(), wanted, pulled, strict=True):
                    if want and plane != ABSENT:
                        found[j] = self.draft.sum_of(found[j], plane, f"cotangent of node {j}")

    # --- what the operations ask for --------------------------------------------------------------------------------

    def node(self, i: int) -> Node:
        """The node."""
        return self.program.nodes[i]

    def constants(self, i: int) -> tuple[float, ...]:
        """The node's own numbers."""
        return constants_of(self.node(i), self.consts)

    def shape(self, i: int, lead: int | None = None) -> Dims:
        """Of the value of a node; `lead`: how many tasks have their own (all where samples do)."""
        node = self.node(i)
        if node.batched:
            return self.tasks, self.samples, node.rows, node.features
        return self.tasks if lead is None else lead, 1, node.rows, node.features

    def lead(self, *planes: int) -> int:
        """The number of tasks of what is computed from these planes."""
        return max((self.draft.shape(plane)[0] for plane in planes if plane != ABSENT), default=1)

    def weight(self, i: int) -> int:
        """The plane of the node's weight, or ABSENT."""
        at = self.node(i).weight
        return self.theta[at] if at >= 0 else ABSENT

    def bias(self, i: int) -> int:
        """The plane of the node's bias, or ABSENT."""
        at = self.node(i).bias
        return self.theta[at] if at >= 0 else ABSENT


@dataclasses.dataclass
class Pull:
    """One node's share of a pull: `dt` is the cotangent that arrives; with `along`, the tangent of it, and then `d`,
    the cotangent itself, is that of the pull before (ABSENT where the node had none).
    """

    on: Pass
    i: int
    dt: int
    along: Along | None
    sink: Sink
    wanted: Sequence[bool]
    keep: bool

    @property
    def d(self) -> int:
        """The cotangent beside its tangent."""
        return self.on.cotangents[self.i] if self.along is not None and self.on.cotangents else ABSENT

    def tangent(self, j: int) -> int:
        """The tangent of a value."""
        return self.along.values[j] if self.along is not None else ABSENT

    def direction(self, param: int) -> int:
        """The direction of a parameter (-1: none)."""
        return self.along.directions[param] if self.along is not None and param >= 0 else ABSENT

    def of_params(self) -> tuple[bool, bool, bool]:
        """Whether the gradients of weight and bias are wanted, and whether summed over tasks."""
        node = self.on.node(self.i)
        params = [p for p in (node.weight, node.bias) if p >= 0 and self.sink.wants(p)]
        over = bool(params) and all(p in self.sink.over_tasks for p in params)
        return node.weight in params, node.bias in params, over

    def hand_over(self, weight: int, bias: int) -> None:
        """The parameters' gradients to the sink."""
        node = self.on.node(self.i)
        for param, plane in ((node.weight, weight), (node.bias, bias)):
            if plane != ABSENT:
                self.sink.take(param, plane)


@dataclasses.dataclass(frozen=True)
class NodeRule:
    """How one operation is written down: its value; its tangent (ABSENT for zero); the cotangents of its operands."""

    forward: Callable[[Pass, int], int]
    tangent: Callable[[Pass, int, Along], int]
    pull: Callable[[Pull], Sequence[int]]


NODES: dict[int, NodeRule] = {}


def node_rule(code: int, rule: NodeRule) -> None:
    """Add an operation's rule."""
    NODES[code] = rule


def used_nodes(program: Encoded) -> list[int]:
    """The nodes on which the output depends, in order."""
    used = {program.output}
    for i in range(program.output, -1, -1):
        if i in used:
            used.update(program.nodes[i].operands())
    return sorted(used)


def depends(program: Encoded, on_param: Callable[[int], bool], wants_inputs: bool = False) -> list[bool]:
    """For every node, whether its value depends on one of these parameters (or on an input that has a gradient)."""
    found: list[bool] = []
    for node in program.nodes:
        own = any(p >= 0 and on_param(p) for p in (node.weight, node.bias))
        is_input = wants_inputs and OPS[node.op].reads_input and not (node.weight >= 0)
        found.append(own or is_input or any(found[j] for j in node.operands()))
    return found
