"""Builds a layer program: every method takes values and emits the nodes that compute the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from mtml_kernels.program.activations import Act, Constants
from mtml_kernels.program.encoding import (
    LAYOUT_CONV,
    LAYOUT_IN_OUT,
    LAYOUT_LINEAR,
    LAYOUT_ROWS,
    LAYOUT_STEPS,
    InputInfo,
    Node,
    ParamInfo,
    Program,
    Shape,
)
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op
from mtml_kernels.program.values import Memory, Value, broadcast, pad, resolve_view, split_point, without_lead

__all__ = ["Builder", "Draft"]

_USES = {
    LAYOUT_LINEAR: "a linear weight",
    LAYOUT_IN_OUT: "a linear weight [in, out]",
    LAYOUT_ROWS: "a plain value",
    LAYOUT_CONV: "a convolution's weight",
    LAYOUT_STEPS: "rows for the steps",
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A node whose operands are drafts and whose weights are names, until the program is finished."""

    node: Node
    weight: str = ""
    bias: str = ""
    constants: Constants | None = None


class Builder:
    """Emits nodes; equal nodes are emitted once. `path` names where the next node comes from."""

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Sequence[InputInfo]) -> None:
        self.tensors = tensors
        self.inputs = inputs
        self.path = ""
        self._drafts: list[Draft] = []
        self._paths: list[str] = []
        self._known: dict[Draft, int] = {}
        self._layouts: dict[str, int] = {}
        self._memories: dict[str, Memory] = {}
        self._statistics: set[str] = set()
        self._tables: set[str] = set()

    # Leaves

    def input(self, index: int) -> Value:
        """An input of the program, one sample in one row of its last dimension."""
        info = self.inputs[index]
        value = self.value(-1, info.shape, 1, Memory(f"the input {info.name}"))
        node = Node(Op.INPUT, a=index, rows=value.rows, features=value.features)
        return dataclasses.replace(value, node=self.emit(Draft(node), f"input {info.name}"))

    def param(self, name: str) -> Value:
        """A parameter or buffer, not read yet: how it is read decides its layout."""
        tensor = self.tensors[name]
        _check_tensor(name, tensor)
        memory = self._memories.setdefault(name, Memory(f"the parameter {name}"))
        return dataclasses.replace(self.value(-1, tuple(tensor.shape), 0, memory), param=name)

    def read(self, name: str, layout: int) -> str:
        """The name of a parameter that a node reads in this layout, which must be that of its other readers."""
        known = self._layouts.setdefault(name, layout)
        if known != layout:
            uses = " and as ".join(_USES[use] for use in sorted((known, layout), key=lambda use: use == LAYOUT_ROWS))
            raise Cannot(f"the parameter {name} is used as {uses}")
        return name

    def layout(self, name: str) -> int | None:
        """In which layout nodes read this parameter so far."""
        return self._layouts.get(name)

    def input_of(self, ids: Value) -> int:
        """The index of the input that a value is or is a view of; -1 where it is neither."""
        leaf = self.node(ids.node) if ids.node >= 0 else Node(-1)
        while leaf.op == Op.VIEW:
            leaf = self.node(leaf.a)
        return leaf.a if leaf.op == Op.INPUT and not ids.image else -1

    def read_as_table(self, name: str) -> None:
        """Note that an embedding reads rows of this parameter."""
        self._tables.add(name)

    def statistic(self, name: str) -> Value:
        """A running statistic: PyTorch gives it no gradient."""
        self._statistics.add(name)
        return self.param(name)

    # Shapes

    def matrix(self, value: Value, rows: int = 0, features: int = 0) -> int:
        """The node that holds `value` with these rows and features (by default those of its shape)."""
        rows, features = rows or value.rows, features or value.features
        node = value.node
        if value.image:
            node = self._swapped(node, value.points, value.shape[0])
        elif node < 0:
            if value.transposed and min(value.shape) > 1:
                raise Cannot(f"the transpose of the parameter {value.param} is used as a value")
            tensor_shape = tuple(self.tensors[value.param].shape)
            info = ParamInfo(value.param, tensor_shape, LAYOUT_ROWS)
            leaf = Node(Op.PARAM, rows=info.rows, features=info.cols, batched=0)
            node = self.emit(Draft(leaf, weight=self.read(value.param, LAYOUT_ROWS)), f"parameter {value.param}")
        return self._view(node, rows, features)

    def _view(self, node: int, rows: int, features: int) -> int:
        draft = self._drafts[node]
        if (draft.node.rows, draft.node.features) == (rows, features):
            return node
        if draft.node.op == Op.INPUT:
            return self.emit(Draft(dataclasses.replace(draft.node, rows=rows, features=features)), self._paths[node])
        if draft.node.op == Op.VIEW:
            return self._view(draft.node.a, rows, features)
        return self.emit(Draft(Node(Op.VIEW, a=node, rows=rows, features=features, batched=draft.node.batched)))

    def _swapped(self, node: int, rows: int, features: int) -> int:
        """The elements of a node, seen as [rows, features], as [features, rows]."""
        if 1 in (rows, features):
            return self._view(node, features, rows)
        node = self._view(node, rows, features)
        draft = self._drafts[node].node
        if draft.op == Op.TRANSPOSE:
            return draft.a
        return self.emit(Draft(Node(Op.TRANSPOSE, a=node, rows=features, features=rows, batched=draft.batched)))

    def image(self, value: Value) -> int:
        """The node that holds a value [channels, *space] in image form."""
        if value.image:
            return value.node
        if value.lead > 1:
            raise Cannot(f"{value} is not a batch of images: its batch dimension holds several points of each sample")
        return self._swapped(self.matrix(value), value.shape[0], value.points)

    def reshape(self, value: Value, lead: int, shape: Shape) -> Value:
        """The same elements and memory under another shape."""
        if value.image and lead == 1 and len(shape) > 1 and shape[0] == value.shape[0]:  # the points change their shape
            return dataclasses.replace(value, shape=shape)
        node = self.matrix(value) if value.param or value.image else value.node
        return Value(node, shape, lead, value.memory, value.version)

    def rotate(self, value: Value, count: int) -> Value:
        """The first `count` dimensions of each sample behind the others, as one transposition."""
        shape = (*value.shape[count:], *value.shape[:count])
        rows = math.prod(value.shape[:count])
        if value.lead > 1:
            raise Cannot(f"transposing the elements of {value} is not fused where points are in the batch dimension")
        if not value.image and value.batched and count == len(value.shape) - 1 and len(shape) > 1:
            node = self.matrix(value, rows, value.shape[-1])  # channels last, as an image is held
            return Value(node, shape, value.lead, value.memory, value.version, image=True)
        if value.image and count == 1:
            node = value.node
        else:
            node = self._swapped(self.matrix(value), rows, math.prod(value.shape[count:]))
        return Value(node, shape, value.lead, value.memory, value.version)

    def view(self, value: Value, sizes: Sequence[object]) -> Value:
        """The value under sizes as `tensor.view` takes them."""
        return self.reshape(value, *resolve_view(value, sizes))

    def copy(self, value: Value) -> Value:
        """The same elements in memory of their own."""
        if value.image:
            return self.value(value.node, value.shape, value.lead, image=True)
        return self.value(self.matrix(value), value.shape, value.lead)

    def expand(self, value: Value, lead: int, shape: Shape) -> Value:
        """An unbatched value repeated over the batch: [N * lead, *shape]."""
        tail = without_lead(value, len(shape) + 1)
        tail = pad(tail, len(shape))
        if any(have not in (1, want) for have, want in zip(tail, shape, strict=True)):
            raise Cannot(f"{value} cannot be expanded to {list(shape)} per sample")
        cut = next((i for i, size in enumerate(tail) if size != 1), len(tail))
        if tail[cut:] != shape[cut:]:
            raise Cannot(f"expanding {value} to {list(shape)} per sample repeats inside its rows")
        rows, features = lead * math.prod(shape[:cut]), math.prod(shape[cut:])
        node = Node(Op.EXPAND, a=self.matrix(value, 1, features), rows=rows, features=features)
        return Value(self.emit(Draft(node)), shape, lead, value.memory, value.version)

    # Computation

    def act(self, kind: Act, x: Value, constants: Constants) -> Value:
        """A pointwise function with its constants, none or two."""
        node = self._any_form(x)
        draft = self._drafts[node]
        if kind.info.frequency and draft.node.op == Op.AFFINE and draft.constants and draft.constants[1] == 0.0:
            constants, node = (constants[0] * draft.constants[0], 0.0), draft.node.a
        return self._like(x, Op.ACT, node, int(kind), constants or None)

    def affine(self, x: Value, c0: float, c1: float) -> Value:
        """c0 * x + c1; a chain of them becomes one."""
        node = self._any_form(x)
        draft = self._drafts[node]
        if draft.node.op == Op.AFFINE and draft.constants is not None:
            node = draft.node.a
            c0, c1 = c0 * draft.constants[0], c0 * draft.constants[1] + c1
        return self._like(x, Op.AFFINE, node, -1, (c0, c1))

    def elementwise(self, op: Op, a: Value, b: Value) -> Value:
        """ADD or MUL, broadcast."""
        lead, shape = broadcast(a, b)
        result = self.value(-1, shape, lead)
        nodes = self._as_images(a, b, shape) if a.image or b.image else []
        if nodes:
            node = Node(op, a=nodes[0], b=nodes[1], rows=result.points, features=shape[0])
            return dataclasses.replace(result, node=self.emit(Draft(node)), image=True)
        operands = [(value, self._aligned(value, result)) for value in (a, b)]
        cut = split_point(result.dims, operands)
        rows, features = math.prod(result.dims[:cut]), math.prod(result.dims[cut:])
        nodes = [self.matrix(v, math.prod(dims[:cut]), math.prod(dims[cut:])) for v, dims in operands]
        node = Node(op, a=nodes[0], b=nodes[1], rows=rows, features=features, batched=int(result.batched))
        return dataclasses.replace(result, node=self.emit(Draft(node)))

    def _as_images(self, a: Value, b: Value, shape: Shape) -> list[int]:
        """The operands in image form, or [] where they do not broadcast in it."""
        operands = []
        for value in (a, b):
            dims = self._aligned(value, self.value(-1, shape, 1))[1:]
            one_row = math.prod(dims[1:]) == 1 and not value.batched
            if dims[1:] != shape[1:] and not one_row:
                return []
            operands.append((value, dims))
        return [self.image(self.reshape(value, value.lead, dims)) for value, dims in operands]

    @staticmethod
    def _aligned(value: Value, result: Value) -> Shape:
        """The value's dimensions beside `result.dims`."""
        if value.batched or not result.batched:
            return pad(value.dims, len(result.dims))
        return pad(without_lead(value, result.ndim) or (1,), len(result.dims))

    def cat(self, values: Sequence[Value], dim: int) -> Value:
        """Joins along a dimension of the tensors (counted with the batch), which must not be the batch's."""
        first = values[0]
        at = dim - int(first.batched)
        if at < 0:
            raise Cannot("it joins along the batch dimension")
        shapes = [(v.lead, v.shape[:at], v.shape[at + 1 :]) for v in values]
        if any(v.ndim != first.ndim for v in values) or any(shape != shapes[0] for shape in shapes):
            raise Cannot("it joins " + ", ".join(map(str, values)) + "; expand what has no batch dimension")
        if at == 0 and any(v.image for v in values):
            return self._cat_channels(values)
        rows = (first.lead or 1) * math.prod(first.shape[:at])
        node, features = self._block(first, rows), first.elements // rows
        for value in values[1:]:
            features += value.elements // rows
            cat = Node(Op.CAT, a=node, b=self._block(value, rows), rows=rows, features=features)
            node = self.emit(Draft(dataclasses.replace(cat, batched=int(first.batched))))
        shape = (*first.shape[:at], sum(v.shape[at] for v in values), *first.shape[at + 1 :])
        return self.value(node, shape, first.lead)

    def _cat_channels(self, values: Sequence[Value]) -> Value:
        node, channels = self.image(values[0]), values[0].shape[0]
        for value in values[1:]:
            channels += value.shape[0]
            node = self.emit(Draft(Node(Op.CAT, a=node, b=self.image(value), rows=value.points, features=channels)))
        return self.value(node, (channels, *values[0].shape[1:]), 1, image=True)

    def _block(self, value: Value, rows: int) -> int:
        return self.matrix(value, rows, value.elements // rows)

    def per_channel(self, row: Value, x: Value) -> Value:
        """A value [C] beside x [C, *space]."""
        return self.reshape(row, 0, (*row.shape, *(1 for _ in x.shape[1:])))

    # Emission

    def _any_form(self, x: Value) -> int:
        """A node with x's elements in whatever rows and features it already has."""
        return x.node if x.node >= 0 else self.matrix(x)

    def _like(self, x: Value, op: Op, a: int, b: int, constants: Constants | None) -> Value:
        """A pointwise node over node `a`, in its form; the result has x's shape."""
        form = self._drafts[a].node
        node = Node(op, a=a, b=b, rows=form.rows, features=form.features, batched=form.batched)
        return self.value(self.emit(Draft(node, constants=constants)), x.shape, x.lead, image=x.image)

    def value(self, node: int, shape: Shape, lead: int, memory: Memory | None = None, *, image: bool = False) -> Value:
        """A tensor in memory of its own (or `memory`) that the node holds."""
        memory = memory or Memory()
        return Value(node, shape, lead, memory, memory.version, image=image)

    def node(self, index: int) -> Node:
        """An emitted node, whose form may be asked for."""
        return self._drafts[index].node

    def emit(self, draft: Draft, path: str = "") -> int:
        """The index of the node, which is emitted where there is no equal one."""
        if draft not in self._known:
            self._known[draft] = len(self._drafts)
            self._drafts.append(draft)
            self._paths.append(path or self.path)
        return self._known[draft]

    # The finished program

    def finish(self, output: Value) -> Program:
        """The program that computes `output`, without what it does not need."""
        last = self.matrix(output)
        used = self._reachable(last)
        position = {old: new for new, old in enumerate(used)}
        drafts = [self._drafts[i] for i in used]
        names = {name for draft in drafts for name in (draft.weight, draft.bias) if name}
        params = [ParamInfo(n, tuple(t.shape), self._layout(n)) for n, t in self.tensors.items() if n in names]
        index = {param.name: i for i, param in enumerate(params)}
        nodes, consts = [], list[float]()
        for draft in drafts:
            nodes.append(_placed(draft, position, index, len(consts)))
            consts += draft.constants or ()
        return Program(
            nodes=tuple(nodes),
            params=tuple(params),
            inputs=tuple(self._inputs(drafts)),
            output=position[last],
            output_shape=output.shape,
            consts=tuple(consts),
            paths=tuple(self._paths[i] for i in used),
            statistics=tuple(param.name for param in params if param.name in self._statistics),
        )

    def _layout(self, name: str) -> int:
        """How a parameter is held. An embedding reads rows, or what another layer has made of them."""
        layout = self._layouts.get(name, LAYOUT_ROWS)
        if name in self._tables and layout not in (LAYOUT_ROWS, LAYOUT_LINEAR):
            raise Cannot(f"the parameter {name} is used as {_USES[layout]} and as a table of rows")
        return layout

    def _inputs(self, drafts: Sequence[Draft]) -> Iterator[InputInfo]:
        ids, values = ({d.node.a for d in drafts if d.node.op == op} for op in (Op.EMBEDDING, Op.INPUT))
        for i, info in enumerate(self.inputs):
            if i in ids and i in values:
                raise Cannot(f"the input {info.name} is used as ids and as a value")
            yield dataclasses.replace(info, ids=i in ids)

    def _reachable(self, last: int) -> list[int]:
        found, waiting = set[int](), [last]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self._drafts[node].node.operands()
        return sorted(found)


def _placed(draft: Draft, position: Mapping[int, int], params: Mapping[str, int], const: int) -> Node:
    """The draft as a node of the finished program."""
    node = draft.node
    operands = [position[i] for i in node.operands()]
    return dataclasses.replace(
        node,
        op=int(node.op),
        a=operands[0] if operands else node.a,
        b=operands[1] if len(operands) > 1 else node.b,
        weight=params[draft.weight] if draft.weight else -1,
        bias=params[draft.bias] if draft.bias else -1,
        const=const if draft.constants else -1,
    )


def _check_tensor(name: str, tensor: Tensor) -> None:
    kind = f"the parameter {name}" if isinstance(tensor, nn.Parameter) else f"the buffer {name}"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_sparse:
        raise Cannot(f"{kind} is a {type(tensor).__name__}, not a plain dense tensor")
    if not tensor.is_floating_point():
        raise Cannot(f"{kind} has dtype {tensor.dtype}; only floating-point tensors are fused")
    if tensor.numel() == 0:
        raise Cannot(f"{kind} has no elements")
