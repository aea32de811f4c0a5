"""A program beside its module: equal values and derivatives, and an encoding that keeps the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.program import (
    LAYOUT_CONV,
    LAYOUT_ROWS,
    LAYOUT_STEPS,
    Node,
    Norm,
    Op,
    Program,
    constants_of,
    decode,
)
from mtml_kernels.program.execution import run_program


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def random_inputs(shapes: Any, n: int) -> Any:
    if isinstance(shapes, Mapping):
        return {k: torch.randn(n, *s, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    return [torch.randn(n, *s, dtype=torch.float64, requires_grad=True) for s in shapes]


def run(model: nn.Module, program: Program, inputs: Any) -> Tensor:
    tensors = tensors_of(model)
    values = [inputs[i.name] for i in program.inputs] if isinstance(inputs, Mapping) else inputs
    flat = run_program(program.ints, program.consts, [tensors[p.name] for p in program.params], values)
    return flat.reshape(flat.shape[0], *program.output_shape)


def assert_equal(model: nn.Module, program: Program, shapes: Any, n: int, *, second: bool = False) -> None:
    """Outputs and gradients of parameters and inputs, with `second` the gradients' gradients too, agree to rounding."""
    inputs = random_inputs(shapes, n)
    leaves = [p for p in model.parameters() if p.requires_grad]
    leaves += list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    copies = {k: v.clone() for k, v in inputs.items()} if isinstance(inputs, Mapping) else [v.clone() for v in inputs]
    expected = model(**copies) if isinstance(copies, Mapping) else model(*copies)
    found = run(model, program, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(expected)
    # the square makes second derivatives of linear models other than zero
    scalars = [((out + out.square()) * direction).sum() for out in (found, expected)]
    grads = [_gradients(scalar, leaves, second) for scalar in scalars]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)
    if second:
        along = [torch.randn_like(leaf) for leaf in leaves]
        products = [sum((g * v).sum() for g, v in zip(each, along, strict=True)) for each in grads]
        again = [_gradients(product, leaves, False) for product in products]
        scale = max(1.0, *(float(g.abs().max()) for g in again[1]))
        torch.testing.assert_close(again[0], again[1], rtol=1e-8, atol=1e-9 * scale)


def _gradients(scalar: Any, leaves: Sequence[Tensor], graph: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar, leaves, create_graph=graph, allow_unused=True, materialize_grads=True)


def check_encoding(program: Program) -> None:
    """The integers say all that the nodes say, and every node obeys the rules of the program."""
    encoded = decode(program.ints)
    assert encoded.nodes == program.nodes and encoded.output == program.output
    assert encoded.params == tuple((p.layout, p.rows, p.cols) for p in program.params)
    assert encoded.input_sizes == tuple(i.size for i in program.inputs)
    for index, node in enumerate(program.nodes):
        assert all(0 <= a < index for a in node.operands())
        assert node.const < 0 or node.const + len(constants_of(node, program.consts)) <= len(program.consts)
        operands = [program.nodes[a] for a in node.operands()]
        check_node(program, node, operands)


def check_node(program: Program, node: Node, operands: list[Node]) -> None:
    size = node.rows * node.features
    if node.op == Op.INPUT:
        assert size == program.inputs[node.a].size and node.batched
    elif node.op == Op.PARAM:
        info = program.params[node.weight]
        assert (node.rows, node.features, node.batched) == (info.rows, info.cols, 0) and info.layout == LAYOUT_ROWS
    elif node.op == Op.EXPAND:
        assert operands[0].rows == 1 and not operands[0].batched and node.batched
    elif node.op == Op.LINEAR:
        info = program.params[node.weight]
        assert (info.rows, info.cols) == (node.features, operands[0].features) and node.rows == operands[0].rows
    elif node.op == Op.CAT:
        assert node.features == sum(a.features for a in operands)
        assert all((a.rows, a.batched) == (node.rows, node.batched) for a in operands)
    elif node.op == Op.TRANSPOSE:
        assert (node.rows, node.features) == (operands[0].features, operands[0].rows)
        assert operands[0].batched == node.batched and min(node.rows, node.features) > 1
    elif node.op in (Op.CONV, Op.POOL):
        check_window(program, node, operands[0])
    elif node.op == Op.NORM:
        assert (node.rows, node.features, node.batched) == (operands[0].rows, operands[0].features, 1)
        eps, groups = constants_of(node, program.consts)
        assert (eps > 0 or (eps, node.b) == (-1, Norm.RMS)) and node.features % groups == 0
        check_affine(program, node, node.features)
    elif node.op in (Op.ADD, Op.MUL):
        assert all(broadcasts(a, node) for a in operands)
    else:
        same_size = operands[0].rows * operands[0].features == size
        assert operands[0].batched == node.batched and (same_size or node.op not in (Op.VIEW, Op.ACT, Op.AFFINE))


def broadcasts(a: Node, node: Node) -> bool:
    if a.batched > node.batched:
        return False
    one_row = a.rows == 1 and not a.batched
    return (a.rows == node.rows or one_row) and a.features in (1, node.features)


def check_window(program: Program, node: Node, operand: Node) -> None:
    height, width, out_height, out_width, kh, kw, *_, last = constants_of(node, program.consts)
    assert (operand.rows, operand.batched, node.batched) == (height * width, 1, 1)
    assert node.rows == out_height * out_width
    if node.op == Op.POOL:
        assert node.features == operand.features and node.weight == node.bias == -1
        return
    info = program.params[node.weight]
    assert (info.layout, info.rows, info.cols) == (LAYOUT_CONV, node.features, operand.features // last * kh * kw)
    assert math.prod(info.shape) == info.rows * info.cols
    assert node.bias < 0 or program.params[node.bias].shape == (node.features,)


def check_affine(program: Program, node: Node, features: int) -> None:
    for index in (node.weight, node.bias):
        if index >= 0:
            info = program.params[index]
            assert info.cols == features and (info.layout, info.rows) in ((LAYOUT_ROWS, 1), (LAYOUT_STEPS, info.rows))
