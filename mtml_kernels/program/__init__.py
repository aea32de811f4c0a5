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
            many follow: CONV and POOL 13 (H, W, OH, OW, kh, kw, sh, sw, ph, pw, dh, dw, groups or divisor), others 2
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mtml_kernels.schema.program import HEADER_INTS, NODE_INTS, PARAM_INTS

if TYPE_CHECKING:
    from torch import nn

VERSION = 2
LAYOUT_LINEAR = 0  # a linear weight [out, in]
LAYOUT_ROWS = 1  # rows x cols: [F] is 1 x F, a scalar 1 x 1, [a, b, F] is a*b x F
LAYOUT_CONV = 2  # a convolution's weight [O, C/groups, kh, kw] or [O, C/groups, k]: O rows
LAYOUT_STEPS = 3  # a NORM's weight or bias with a row for every inner step [K, C]; never adapted (see `step_row`)

Shape = tuple[int, ...]


class Op(enum.IntEnum):
    """What a node computes from the values `a` and `b`."""

    INPUT = 0  # a = index of the input
    PARAM = 1  # weight = index of the parameter (layout rows)
    VIEW = 2  # the elements of a, row-major, with other rows and features
    LINEAR = 3  # a @ weight.T + bias
    ACT = 4  # b = Act
    ADD = 5
    MUL = 6
    CAT = 7  # along features
    EXPAND = 8  # one unbatched row, repeated for every row of every sample
    AFFINE = 9  # c0 * a + c1
    TRANSPOSE = 10  # rows and features change places
    CONV = 11  # a convolution with zero padding over an image
    NORM = 12  # b = Norm: (a - mean) / sqrt(var + c0) * weight + bias; c1 = groups
    POOL = 13  # b = Pool
    EMBEDDING = 14  # rows of the table `weight` at the ids of input a; c0 = the id without a gradient, or -1


class Act(enum.IntEnum):
    """Pointwise functions; c0 and c1 are the node's constants."""

    RELU = 0
    LEAKY_RELU = 1  # c0 = slope
    TANH = 2
    SIGMOID = 3
    GELU = 4  # with erf
    GELU_TANH = 5
    SILU = 6
    SOFTPLUS = 7  # c0 = beta, c1 = threshold
    SIN = 8  # sin(c0 * x)
    COS = 9  # cos(c0 * x)
    RSQRT = 10  # 1 / sqrt(x + c0)


class Norm(enum.IntEnum):
    """What mean and (biased) variance are taken over."""

    BATCH = 0  # for each feature: all samples of the set and all rows
    GROUP = 1  # for each sample and group of neighbouring features: the group and all rows
    LAYER = 2  # for each sample and row: the features


class Pool(enum.IntEnum):
    """How a window becomes a point."""

    MAX = 0  # padded with -inf
    AVG = 1  # divisor 0: the window with its padding, -1: the points inside the image, > 0: that number
    ADAPTIVE_AVG = 2  # window i of n: floor(i * H / n) .. ceil((i + 1) * H / n); kernel, stride and padding are unused


CONST_COUNTS = {Op.CONV: 13, Op.POOL: 13}  # all other nodes with constants have two


class Unfusable(Exception):
    """The module cannot be written as a layer program.

    Attributes:
        reasons: one line per obstacle, each naming the module path or graph node and why it stands in the way.
        nodes: what was seen, in the form of `Program.describe()`, with `"fused": False` on the obstacles.
    """

    def __init__(self, reasons: Sequence[str], nodes: Sequence[dict[str, object]] = ()) -> None:
        self.reasons: list[str] = list(reasons)
        self.nodes: list[dict[str, object]] = [dict(node) for node in nodes]
        super().__init__("; ".join(self.reasons))


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """A parameter or buffer of the module that the program reads; `layout` is one of LAYOUT_*."""

    name: str
    shape: Shape
    layout: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.layout == LAYOUT_CONV else math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        if self.layout == LAYOUT_CONV:
            return math.prod(self.shape[1:])
        return self.shape[-1] if self.shape else 1


@dataclasses.dataclass(frozen=True)
class InputInfo:
    """An input of the module: its name, the shape of one sample, and whether it holds the ids of an embedding."""

    name: str
    shape: Shape
    ids: bool = False

    @property
    def size(self) -> int:
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
        return (
            int(self.op), self.a, int(self.b), self.weight, self.bias,
            self.rows, self.features, self.batched, self.const,
        )  # fmt: skip

    def operands(self) -> tuple[int, ...]:
        """The value ids that this node reads."""
        if self.op in (Op.INPUT, Op.PARAM, Op.EMBEDDING):
            return ()
        return (self.a, self.b) if self.op in (Op.ADD, Op.MUL, Op.CAT) else (self.a,)


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
    def ints(self) -> tuple[int, ...]:
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
    return tuple(consts[node.const : node.const + CONST_COUNTS.get(Op(node.op), 2)])


def op_name(node: Node, constants: Sequence[float] = ()) -> str:
    """`linear`, `tanh`, `batch_norm`, `max_pool`, `conv2d 3x3 /2` (with the stride where it is not 1), ..."""
    if node.op == Op.ACT:
        return Act(node.b).name.lower()
    if node.op in (Op.NORM, Op.POOL):
        kind = Norm(node.b) if node.op == Op.NORM else Pool(node.b)
        return f"{kind.name.lower()}_{Op(node.op).name.lower()}"
    if node.op == Op.CONV and constants:
        return _conv_name([int(c) for c in constants])
    return Op(node.op).name.lower()


def _conv_name(constants: Sequence[int]) -> str:
    """A line of points under a one-line kernel is a sequence."""
    height, _, _, _, kh, kw, sh, sw, _, _, dh, dw, groups = constants
    line = height == kh == 1
    name = f"conv1d {kw}" if line else f"conv2d {kh}x{kw}"
    if (sh, sw) != (1, 1):
        name += f" /{sw}" if sh == sw or line else f" /{sh}x{sw}"
    if (dh, dw) != (1, 1):
        name += " dilated"
    return name + (f" groups {groups}" if groups > 1 else "")


def step_row(rows: int, step: int | None, query: bool) -> int:
    """Which row of a LAYOUT_STEPS parameter a pass reads.

    A support pass at theta_k reads row k; a query pass at theta_k the row of the step that led there, k - 1. A row
    beyond the last, and a pass outside the inner loop (step None), reads the last.
    """
    if step is None:
        return rows - 1
    return min(max(step - 1, 0) if query else step, rows - 1)


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


def trace(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape], *, batch_norm: str = "module") -> Program:
    """The layer program of `model` in its present mode (train or eval).

    Args:
        model: any module. A private copy of it is traced with torch.fx and compared with its trace on random inputs,
            in a thread of its own: neither the module nor whoever runs it meanwhile notices, and contexts around the
            call (autocast, hooks on saved tensors, transforms, modes, a default device) say nothing about the program.
            What the copy shares: classes, globals, datasets, and objects that cannot be copied (locks, files).
        shapes: the shape of one sample of each input, without the batch dimension: a sequence for positional
            arguments, a mapping for keyword arguments. An input that only embeddings read holds integer ids.
        batch_norm: how batch normalisation layers normalise: "module" as they stand; "batch" or "per_step" by batch
            statistics; "running" by running statistics; "track" as they stand, refusing those that would update their
            statistics, which a program cannot.

    Raises:
        Unfusable: some operation has no counterpart in the program; `.reasons` names each.
        MemoryError: there was no room for the copy, which says nothing about the module.

    A program leaves running statistics alone. It describes the module as it was when traced: trace again after
    train()/eval(), after replacing a submodule or changing a Python attribute that forward reads.

    Example:
        >>> import torch
        >>> from mtml_kernels.program import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> [record["op"] for record in trace(net, [(2,)]).describe()]
        ['input', 'linear', 'tanh', 'linear']
    """
    from mtml_kernels.program.tracer import trace_module

    return trace_module(model, shapes, batch_norm)
