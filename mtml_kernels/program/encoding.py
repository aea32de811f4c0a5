"""The layer program: what a fused kernel executes instead of calling a module.

A program is a list of nodes over matrices. The value of node i belongs to one task and has `rows` rows per sample and
`features` columns: a per-sample tensor of shape (d1, ..., dm) has features = dm and rows = d1 * ... * d(m-1); a scalar
per sample has one row and one feature. Images are held channels last: a row for every point of the image (row-major;
one line of points for sequences), a feature for every channel. *Batched* values exist once per sample; *unbatched*
values are computed from parameters alone (a latent code, a FiLM scale) and exist once per task.

Programs travel into operators as `ints` and `consts`, so that an operator's schema carries no Python object:

    ints    [version, inputs, params, nodes, output value]
            per input  [elements per sample]; those that an EMBEDDING reads are int64 ids
            per param  [layout, rows, cols]
            per node   [op, a, b, weight, bias, rows, features, batched, const]     -1 where absent
    consts  the floats of the nodes that have constants; `const` is the offset of the first, and the operation says how
            many follow (`ops.OpInfo.constants`)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from mtml_kernels.program.ops import OPS, Op
from mtml_kernels.schema.program import HEADER_INTS, NODE_INTS, PARAM_INTS

__all__ = [
    "HEADER_INTS",
    "LAYOUT_CONV",
    "LAYOUT_IN_OUT",
    "LAYOUT_LINEAR",
    "LAYOUT_ROWS",
    "LAYOUT_STEPS",
    "NODE_INTS",
    "PARAM_INTS",
    "VERSION",
    "Encoded",
    "InputInfo",
    "Node",
    "ParamInfo",
    "Program",
    "Shape",
    "constants_of",
    "decode",
    "op_name",
]

VERSION = 2
LAYOUT_LINEAR = 0  # a linear weight [out, in]
LAYOUT_ROWS = 1  # rows x cols: [F] is 1 x F, a scalar 1 x 1, [a, b, F] is a*b x F
LAYOUT_CONV = 2  # a convolution's weight [O, C/groups, kh, kw] or [O, C/groups, k]: O rows
LAYOUT_STEPS = 3  # a NORM's weight or bias with a row for every inner step [K, C]; not adapted (`batch_norm.step_row`)
LAYOUT_IN_OUT = 4  # a linear weight stored [in, out], whose matrix is the transpose [out, in]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """A parameter or buffer of the module that the program reads; `layout` is one of LAYOUT_*."""

    name: str
    shape: Shape
    layout: int

    @property
    def rows(self) -> int:
        """Rows of its matrix."""
        if self.layout == LAYOUT_IN_OUT:
            return self.shape[1]
        return self.shape[0] if self.layout == LAYOUT_CONV else math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Columns of its matrix."""
        if self.layout == LAYOUT_CONV:
            return math.prod(self.shape[1:])
        if self.layout == LAYOUT_IN_OUT:
            return self.shape[0]
        return self.shape[-1] if self.shape else 1


@dataclasses.dataclass(frozen=True)
class InputInfo:
    """An input of the module: its name, the shape of one sample, and whether it holds the ids of an embedding."""

    name: str
    shape: Shape
    ids: bool = False

    @property
    def size(self) -> int:
        """Elements of one sample."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation; its value id is its position. The fields are the encoding's, -1 where absent."""

    op: int
    a: int = -1
    b: int = -1
    weight: int = -1
    bias: int = -1
    rows: int = 1
    features: int = 1
    batched: int = 1
    const: int = -1

    def encode(self) -> tuple[int, ...]:
        """The node's integers."""
        return (
            int(self.op), self.a, int(self.b), self.weight, self.bias,
            self.rows, self.features, self.batched, self.const,
        )  # fmt: skip

    def operands(self) -> tuple[int, ...]:
        """The value ids that this node reads."""
        return (self.a, self.b)[: OPS[self.op].operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """A module as a layer program.

    `ints` and `consts` are the encoding that operators take; `output_shape` is the shape of one sample's output;
    `paths` names for every node the module (or the function call) that it came from. `statistics` names the parameters
    that PyTorch gives no gradient (running statistics), while the program would.
    """

    nodes: tuple[Node, ...]
    params: tuple[ParamInfo, ...]
    inputs: tuple[InputInfo, ...]
    output: int
    output_shape: Shape
    consts: tuple[float, ...] = ()
    paths: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in their order."""
        return tuple([param.name for param in self.params])

    @functools.cached_property
    def ints(self) -> tuple[int, ...]:
        """The encoding of everything but the constants."""
        head = [VERSION, len(self.inputs), len(self.params), len(self.nodes), self.output]
        head += [info.size for info in self.inputs]
        for param in self.params:
            head += [param.layout, param.rows, param.cols]
        for node in self.nodes:
            head += node.encode()
        return tuple(head)

    def describe(self) -> list[dict[str, object]]:
        """One record per node: value id, module path, operation, shape, parameters. `explain()` prints these."""
        paths = self.paths or ("",) * len(self.nodes)
        return [self._record(i, node, path) for i, (node, path) in enumerate(zip(self.nodes, paths, strict=True))]

    def _record(self, index: int, node: Node, path: str) -> dict[str, object]:
        names = [self.params[i].name for i in (node.weight, node.bias) if i >= 0]
        constants = constants_of(node, self.consts)
        return {
            "node": index,
            "path": path,
            "op": op_name(node, constants),
            "operands": node.operands(),
            "shape": (node.rows, node.features),
            "batched": bool(node.batched),
            "params": names,
            "constants": constants,
            "fused": True,
        }


def constants_of(node: Node, consts: Sequence[float]) -> tuple[float, ...]:
    """The node's own numbers, () where it has none."""
    if node.const < 0:
        return ()
    return tuple(consts[node.const : node.const + OPS[node.op].constants])


def op_name(node: Node, constants: Sequence[float] = ()) -> str:
    """`linear`, `tanh`, `batch_norm`, `max_pool`, `conv2d 3x3 /2` (with the stride where it is not 1), ..."""
    return OPS[node.op].called(node.b, constants)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the integers alone say: a program without names. `params` holds (layout, rows, cols)."""

    nodes: tuple[Node, ...]
    params: tuple[tuple[int, int, int], ...]
    input_sizes: tuple[int, ...]
    output: int

    @property
    def output_size(self) -> int:
        """Elements of one sample's output."""
        node = self.nodes[self.output]
        return node.rows * node.features

    @functools.cached_property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """For each embedding the input whose ids it reads, and how many rows its table has.

        Raises ValueError where the program has no such input or parameter.
        """
        found = []
        for i, node in enumerate(self.nodes):
            if node.op != Op.EMBEDDING:
                continue
            if not (0 <= node.a < len(self.input_sizes) and 0 <= node.weight < len(self.params)):
                raise ValueError(
                    f"program: node {i} (embedding): expected a to be an input of the program and weight to be a "
                    f"parameter, got {node.a} and {node.weight}; trace the module again"
                )
            found.append((node.a, self.params[node.weight][1]))
        return tuple(found)


@functools.lru_cache(maxsize=256)
def decode(ints: tuple[int, ...]) -> Encoded:
    """The program that `ints` encode.

    Raises ValueError for another version or for a list whose length contradicts its header.
    """
    if len(ints) < HEADER_INTS or ints[0] != VERSION:
        raise ValueError(f"program: expected an encoding of version {VERSION}, got {ints[:1]}; trace the module again")
    _, n_inputs, n_params, n_nodes, output = ints[:HEADER_INTS]
    expected = HEADER_INTS + n_inputs + PARAM_INTS * n_params + NODE_INTS * n_nodes
    if min(n_inputs, n_params) < 0 or len(ints) != expected or not 0 <= output < n_nodes:
        raise ValueError(f"program: its header asks for {expected} integers (output {output}), got {len(ints)}")
    params_at = HEADER_INTS + n_inputs
    nodes_at = params_at + PARAM_INTS * n_params
    return Encoded(
        nodes=tuple(Node(*fields) for fields in _groups(ints[nodes_at:], NODE_INTS)),
        params=tuple((fields[0], fields[1], fields[2]) for fields in _groups(ints[params_at:nodes_at], PARAM_INTS)),
        input_sizes=ints[HEADER_INTS:params_at],
        output=output,
    )


def _groups(values: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    return (values[i : i + size] for i in range(0, len(values), size))
