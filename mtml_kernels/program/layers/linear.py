"""Linear layers: x @ weight.T + bias, with a parameter [O, I] or [I, O] as the weight."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import LAYOUT_IN_OUT, LAYOUT_LINEAR, LAYOUT_ROWS, Node
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, Op, OpInfo, operation
from mtml_kernels.program.values import Value, listed, optional, tensor
from mtml_kernels.program.vocabulary import Weights, function, layer

__all__: list[str] = []


def _compute(given: Given) -> Tensor:
    assert given.weight is not None
    return F.linear(given.operands[0], given.weight, None if given.bias is None else given.bias.reshape(-1))


def _compute_transposed(given: Given) -> Tensor:
    assert given.weight is not None
    product = given.operands[0] @ given.weight
    return product if given.bias is None else product + given.bias.reshape(-1)


operation(OpInfo(Op.LINEAR, "linear", _compute))
operation(OpInfo(Op.LINEAR_TRANSPOSED, "linear_transposed", _compute_transposed))


def _build(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if not weight.param:
        raise Cannot("the weight of a linear layer must be a parameter itself, not a value computed from one")
    if len(weight.shape) != 2 or not x.shape:
        raise Cannot(f"a linear layer needs a weight [O, I] and features, got {weight} and {x}")
    outputs, features = weight.shape
    if x.shape[-1] != features:
        raise Cannot(f"the layer expects {features} features, its input is {x}")
    own_bias = bias is not None and bias.is_row(outputs)
    layouts = [LAYOUT_LINEAR, LAYOUT_IN_OUT]
    natural, other = layouts[:: -1 if weight.transposed else 1]
    turned = b.layout(weight.param) == other  # another layer reads it the other way round
    op = Op.LINEAR_TRANSPOSED if turned else Op.LINEAR
    draft = Draft(
        Node(op, a=b.matrix(x), rows=x.rows, features=outputs, batched=int(x.batched)),
        weight=b.read(weight.param, other if turned else natural),
        bias=b.read(bias.param, LAYOUT_ROWS) if bias is not None and own_bias else "",
    )
    out = b.value(b.emit(draft), (*x.shape[:-1], outputs), x.lead)
    return out if bias is None or own_bias else b.elementwise(Op.ADD, out, bias)


@function(F.linear)
def _linear(b: Builder, input: Any, weight: Any, bias: Any = None) -> Any:
    return _build(b, tensor(input), tensor(weight), optional(bias))


@function(operator.matmul, methods="matmul mm mv")
def _matmul(b: Builder, input: Any, other: Any) -> Any:
    x, w = tensor(input), tensor(other)
    if x.param and len(x.shape) == 2 and not w.batched and len(w.shape) == 1:
        return _build(b, w, x)  # W @ z: a layer on one unbatched row
    if w.param and len(w.shape) == 2:
        return _build(b, x, _turned(b, w))
    raise Cannot("a product of two computed tensors is not fused")


def _turned(b: Builder, weight: Value) -> Value:
    """The transpose of a parameter [I, O], or of one."""
    if weight.transposed:
        return b.param(weight.param)
    return Value(-1, weight.shape[::-1], 0, weight.memory, weight.version, weight.param, transposed=True)


@function(torch.einsum)
def _einsum(b: Builder, equation: Any, *operands: Any) -> Any:
    """The spellings of a linear layer: "bi,io->bo", "...i,oi->...o", either operand first."""
    values = [tensor(x) for x in listed(operands)]
    names, _, result = str(equation).replace(" ", "").partition("->")
    given = list(zip(names.split(","), values, strict=False))
    for (of_x, x), (of_w, w) in (given, given[::-1]) if len(values) == 2 == names.count(",") + 1 else ():
        named = len(of_x) == x.ndim or of_x.startswith("...")
        if w.param and len(w.shape) == 2 == len(of_w) and named and of_x[-1:] in of_w:
            inputs, outputs = of_x[-1], of_w.replace(of_x[-1], "")
            if result == of_x[:-1] + outputs and outputs not in of_x:
                return _build(b, x, w if of_w == outputs + inputs else _turned(b, w))
    raise Cannot(f"einsum {equation!r} is not fused (as a linear layer with a parameter as the weight it is)")


@function(methods="addmm")
def _addmm(b: Builder, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise Cannot("addmm with beta or alpha is not fused")
    return b.elementwise(Op.ADD, tensor(input), _matmul(b, mat1, mat2))


@layer(nn.Linear)
def _layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    return _linear(b, input, weights(m.weight), None if m.bias is None else weights(m.bias))
