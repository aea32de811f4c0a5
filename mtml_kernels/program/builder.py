"""Builds a layer program: every method takes values and emits the nodes that compute the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from mtml_kernels.program import (
    LAYOUT_CONV,
    LAYOUT_LINEAR,
    LAYOUT_ROWS,
    LAYOUT_STEPS,
    Act,
    InputInfo,
    Node,
    Norm,
    Op,
    ParamInfo,
    Pool,
    Program,
    Shape,
)
from mtml_kernels.program.values import (
    Cannot,
    Memory,
    Value,
    broadcast,
    pad,
    resolve_view,
    split_point,
    without_lead,
)

Constants = tuple[float, ...]
_USES = {
    LAYOUT_LINEAR: "a linear weight",
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
        info = self.inputs[index]
        value = self._value(-1, info.shape, 1, Memory(f"the input {info.name}"))
        node = Node(Op.INPUT, a=index, rows=value.rows, features=value.features)
        return dataclasses.replace(value, node=self._emit(Draft(node), f"input {info.name}"))

    def param(self, name: str) -> Value:
        """A parameter or buffer, not read yet: how it is read decides its layout."""
        tensor = self.tensors[name]
        _check_tensor(name, tensor)
        memory = self._memories.setdefault(name, Memory(f"the parameter {name}"))
        return dataclasses.replace(self._value(-1, tuple(tensor.shape), 0, memory), param=name)

    def _read(self, name: str, layout: int) -> str:
        known = self._layouts.setdefault(name, layout)
        if known != layout:
            uses = " and as ".join(_USES[use] for use in sorted((known, layout), key=lambda use: use == LAYOUT_ROWS))
            raise Cannot(f"the parameter {name} is used as {uses}")
        return name

    def embed(self, ids: Value, table: Value, padding: int) -> Value:
        """Rows of a parameter [V, E] at the ids of an input; `padding`: the id whose row takes no gradient, or -1."""
        if not table.param or table.transposed or len(table.shape) != 2:
            raise Cannot("the table of an embedding must be a parameter [V, E] itself, not a value computed from one")
        leaf = self._drafts[ids.node].node if ids.node >= 0 else Node(-1)
        while leaf.op == Op.VIEW:
            leaf = self._drafts[leaf.a].node
        if leaf.op != Op.INPUT or ids.image:
            raise Cannot("the ids of an embedding must be an input itself, or a view of one")
        self._tables.add(table.param)
        node = Node(Op.EMBEDDING, a=leaf.a, rows=ids.elements, features=table.shape[1])
        draft = Draft(node, weight=table.param, constants=(float(padding), 0.0))
        return self._value(self._emit(draft), (*ids.shape, table.shape[1]), ids.lead)

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
            node = self._emit(Draft(leaf, weight=self._read(value.param, LAYOUT_ROWS)), f"parameter {value.param}")
        return self._view(node, rows, features)

    def _view(self, node: int, rows: int, features: int) -> int:
        draft = self._drafts[node]
        if (draft.node.rows, draft.node.features) == (rows, features):
            return node
        if draft.node.op == Op.INPUT:
            return self._emit(Draft(dataclasses.replace(draft.node, rows=rows, features=features)), self._paths[node])
        if draft.node.op == Op.VIEW:
            return self._view(draft.node.a, rows, features)
        return self._emit(Draft(Node(Op.VIEW, a=node, rows=rows, features=features, batched=draft.node.batched)))

    def _swapped(self, node: int, rows: int, features: int) -> int:
        """The elements of a node, seen as [rows, features], as [features, rows]."""
        if 1 in (rows, features):
            return self._view(node, features, rows)
        node = self._view(node, rows, features)
        draft = self._drafts[node].node
        if draft.op == Op.TRANSPOSE:
            return draft.a
        return self._emit(Draft(Node(Op.TRANSPOSE, a=node, rows=features, features=rows, batched=draft.batched)))

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
        return self.reshape(value, *resolve_view(value, sizes))

    def copy(self, value: Value) -> Value:
        """The same elements in memory of their own."""
        if value.image:
            return self._value(value.node, value.shape, value.lead, image=True)
        return self._value(self.matrix(value), value.shape, value.lead)

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
        return Value(self._emit(Draft(node)), shape, lead, value.memory, value.version)

    # Computation

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        """x @ weight.T + bias, with a parameter [O, I] as the weight."""
        if not weight.param or weight.transposed:
            raise Cannot("the weight of a linear layer must be a parameter itself, not a value computed from one")
        if len(weight.shape) != 2 or not x.shape:
            raise Cannot(f"a linear layer needs a weight [O, I] and features, got {weight} and {x}")
        outputs, features = weight.shape
        if x.shape[-1] != features:
            raise Cannot(f"the layer expects {features} features, its input is {x}")
        fused_bias = bias is not None and bool(bias.param) and bias.shape == (outputs,)
        draft = Draft(
            Node(Op.LINEAR, a=self.matrix(x), rows=x.rows, features=outputs, batched=int(x.batched)),
            weight=self._read(weight.param, LAYOUT_LINEAR),
            bias=self._read(bias.param, LAYOUT_ROWS) if bias is not None and fused_bias else "",
        )
        out = self._value(self._emit(draft), (*x.shape[:-1], outputs), x.lead)
        return out if bias is None or fused_bias else self.add(out, bias)

    def act(self, kind: Act, x: Value, c0: float = 1.0, c1: float = 0.0) -> Value:
        """A pointwise function. A factor right before sin or cos becomes their frequency (SIREN's w0)."""
        node = self._any_form(x)
        draft = self._drafts[node]
        if kind in (Act.SIN, Act.COS):
            if draft.constants is not None and draft.node.op == Op.AFFINE and draft.constants[1] == 0.0:
                c0, node = c0 * draft.constants[0], draft.node.a
            return self._like(x, Op.ACT, node, int(kind), (c0, 0.0))
        takes_constants = kind in (Act.LEAKY_RELU, Act.SOFTPLUS, Act.RSQRT)
        return self._like(x, Op.ACT, node, int(kind), (c0, c1) if takes_constants else None)

    def affine(self, x: Value, c0: float, c1: float) -> Value:
        """c0 * x + c1; a chain of them becomes one."""
        node = self._any_form(x)
        draft = self._drafts[node]
        if draft.node.op == Op.AFFINE and draft.constants is not None:
            node = draft.node.a
            c0, c1 = c0 * draft.constants[0], c0 * draft.constants[1] + c1
        return self._like(x, Op.AFFINE, node, -1, (c0, c1))

    def add(self, a: Value, b: Value) -> Value:
        return self._elementwise(Op.ADD, a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._elementwise(Op.MUL, a, b)

    def _elementwise(self, op: Op, a: Value, b: Value) -> Value:
        lead, shape = broadcast(a, b)
        result = self._value(-1, shape, lead)
        nodes = self._as_images(a, b, shape) if a.image or b.image else []
        if nodes:
            node = Node(op, a=nodes[0], b=nodes[1], rows=result.points, features=shape[0])
            return dataclasses.replace(result, node=self._emit(Draft(node)), image=True)
        operands = [(value, self._aligned(value, result)) for value in (a, b)]
        cut = split_point(result.dims, operands)
        rows, features = math.prod(result.dims[:cut]), math.prod(result.dims[cut:])
        nodes = [self.matrix(v, math.prod(dims[:cut]), math.prod(dims[cut:])) for v, dims in operands]
        node = Node(op, a=nodes[0], b=nodes[1], rows=rows, features=features, batched=int(result.batched))
        return dataclasses.replace(result, node=self._emit(Draft(node)))

    def _as_images(self, a: Value, b: Value, shape: Shape) -> list[int]:
        """The operands in image form, or [] where they do not broadcast in it."""
        operands = []
        for value in (a, b):
            dims = self._aligned(value, self._value(-1, shape, 1))[1:]
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
            node = self._emit(Draft(dataclasses.replace(cat, batched=int(first.batched))))
        shape = (*first.shape[:at], sum(v.shape[at] for v in values), *first.shape[at + 1 :])
        return self._value(node, shape, first.lead)

    def _cat_channels(self, values: Sequence[Value]) -> Value:
        node, channels = self.image(values[0]), values[0].shape[0]
        for value in values[1:]:
            channels += value.shape[0]
            node = self._emit(Draft(Node(Op.CAT, a=node, b=self.image(value), rows=value.points, features=channels)))
        return self._value(node, (channels, *values[0].shape[1:]), 1, image=True)

    def _block(self, value: Value, rows: int) -> int:
        return self.matrix(value, rows, value.elements // rows)

    # Images

    def conv(self, x: Value, weight: Value, bias: Value | None, space: Shape, constants: Constants) -> Value:
        """A convolution with the constants of `Op.CONV`; `space` is the shape of its output's points."""
        if not weight.param or weight.transposed:
            raise Cannot("the weight of a convolution must be a parameter itself, not a value computed from one")
        outputs = weight.shape[0]
        fused_bias = bias is not None and _is_row(bias, outputs)
        draft = Draft(
            Node(Op.CONV, a=self.image(x), rows=math.prod(space), features=outputs),
            weight=self._read(weight.param, LAYOUT_CONV),
            bias=self._read(bias.param, LAYOUT_ROWS) if bias is not None and fused_bias else "",
            constants=constants,
        )
        out = self._value(self._emit(draft), (outputs, *space), 1, image=True)
        return out if bias is None or fused_bias else self.add(out, self.per_channel(bias, out))

    def pool(self, x: Value, kind: Pool, space: Shape, constants: Constants) -> Value:
        """A pooling with the constants of `Op.POOL`."""
        node = Node(Op.POOL, a=self.image(x), b=int(kind), rows=math.prod(space), features=x.shape[0])
        return self._value(self._emit(Draft(node, constants=constants)), (x.shape[0], *space), 1, image=True)

    def per_channel(self, row: Value, x: Value) -> Value:
        """A value [C] beside x [C, *space]."""
        return self.reshape(row, 0, (*row.shape, *(1 for _ in x.shape[1:])))

    def norm(self, x: Value, kind: Norm, eps: float, groups: int, weight: Value | None, bias: Value | None) -> Value:
        """Normalises a value [C, *space] (LAYER: [..., C]); weight and bias are [C] or, for the steps, [K, C]."""
        image = kind != Norm.LAYER and len(x.shape) > 1
        node = self.image(x) if image else self.matrix(x)
        form = self._drafts[node].node
        names = ["", ""]
        for i, row in enumerate((weight, bias)):
            if row is not None and row.param and len(row.shape) == 2:
                names[i] = self._read(row.param, LAYOUT_STEPS)
            elif row is not None and _is_row(row, form.features):
                names[i] = self._read(row.param, LAYOUT_ROWS)
        if weight is not None and not names[0]:
            names[1] = ""  # the bias comes after the weight
        norm = Node(Op.NORM, a=node, b=int(kind), rows=form.rows, features=form.features)
        draft = Draft(norm, weight=names[0], bias=names[1], constants=(eps, float(groups)))
        out = self._value(self._emit(draft), x.shape, x.lead, image=image)
        if weight is not None and not names[0]:
            out = self.mul(out, weight if kind == Norm.LAYER else self.per_channel(weight, x))
        if bias is not None and not names[1]:
            out = self.add(out, bias if kind == Norm.LAYER else self.per_channel(bias, x))
        return out

    # Emission

    def _any_form(self, x: Value) -> int:
        """A node with x's elements in whatever rows and features it already has."""
        return x.node if x.node >= 0 else self.matrix(x)

    def _like(self, x: Value, op: Op, a: int, b: int, constants: Constants | None) -> Value:
        """A pointwise node over node `a`, in its form; the result has x's shape."""
        form = self._drafts[a].node
        node = Node(op, a=a, b=b, rows=form.rows, features=form.features, batched=form.batched)
        return self._value(self._emit(Draft(node, constants=constants)), x.shape, x.lead, image=x.image)

    def _value(self, node: int, shape: Shape, lead: int, memory: Memory | None = None, *, image: bool = False) -> Value:
        memory = memory or Memory()
        return Value(node, shape, lead, memory, memory.version, image=image)

    def _emit(self, draft: Draft, path: str = "") -> int:
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


def _is_row(value: Value, features: int) -> bool:
    """Whether it is a parameter [F] itself."""
    return bool(value.param) and not value.transposed and value.shape == (features,)


def _check_tensor(name: str, tensor: Tensor) -> None:
    kind = f"the parameter {name}" if isinstance(tensor, nn.Parameter) else f"the buffer {name}"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_sparse:
        raise Cannot(f"{kind} is a {type(tensor).__name__}, not a plain dense tensor")
    if not tensor.is_floating_point():
        raise Cannot(f"{kind} has dtype {tensor.dtype}; only floating-point tensors are fused")
    if tensor.numel() == 0:
        raise Cannot(f"{kind} has no elements")
