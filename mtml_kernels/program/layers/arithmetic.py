"""Sums, products and comparisons."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import nn

from mtml_kernels.program.builder import Builder
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op, OpInfo, operation
from mtml_kernels.program.values import BatchSize, SameType, tensor
from mtml_kernels.program.vocabulary import attribute, function, layer_of

__all__ = ["add"]

operation(OpInfo(Op.ADD, "add", lambda g: g.operands[0] + g.operands[1], operands=2))
operation(OpInfo(Op.MUL, "mul", lambda g: g.operands[0] * g.operands[1], operands=2))
operation(OpInfo(Op.AFFINE, "affine", lambda g: g.constants[0] * g.operands[0] + g.constants[1], constants=2))


def _is_number(x: object) -> bool:
    return isinstance(x, numbers.Real)


@function(operator.add, overwriting="add", assigning=operator.iadd)
def add(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """input + alpha * other, either of them a number."""
    if _is_number(other):
        return b.affine(tensor(input), 1.0, float(alpha) * float(other))
    if _is_number(input):
        return b.affine(tensor(other), float(alpha), float(input))
    other = tensor(other) if alpha == 1 else b.affine(tensor(other), float(alpha), 0.0)
    return b.elementwise(Op.ADD, tensor(input), other)


@function(operator.sub, methods="subtract", overwriting="sub", assigning=operator.isub)
def _sub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(b, input, other, alpha=-alpha)


@function(torch.rsub)
def _rsub(b: Builder, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return add(b, other, input, alpha=-alpha)


@function(operator.mul, methods="multiply", overwriting="mul", assigning=operator.imul)
def _mul(b: Builder, input: Any, other: Any) -> Any:
    if isinstance(input, BatchSize) or isinstance(other, BatchSize):
        return _scaled_batch(input, other)
    if _is_number(input):
        input, other = other, input
    if _is_number(other):
        return b.affine(tensor(input), float(other), 0.0)
    return b.elementwise(Op.MUL, tensor(input), tensor(other))


def _scaled_batch(a: Any, b: Any) -> BatchSize:
    size, factor = (a, b) if isinstance(a, BatchSize) else (b, a)
    if isinstance(factor, int) and factor > 0:
        return BatchSize(size.times * factor)
    raise Cannot("the batch size enters the computation")


@function(operator.floordiv)
def _floordiv(b: Builder, input: Any, other: Any) -> Any:
    if isinstance(input, BatchSize) and isinstance(other, int) and other > 0 and input.times % other == 0:
        return BatchSize(input.times // other)
    raise Cannot("floor division is not fused")


@function(operator.truediv, methods="divide true_divide", overwriting="div", assigning=operator.itruediv)
def _div(b: Builder, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise Cannot("division with rounding is not fused")
    if not _is_number(other) or other == 0:
        raise Cannot("division by a tensor is not fused (by a Python number it is)")
    return b.affine(tensor(input), 1.0 / float(other), 0.0)


@function(operator.neg, methods="negative", overwriting="neg")
def _neg(b: Builder, input: Any) -> Any:
    return b.affine(tensor(input), -1.0, 0.0)


@function(operator.pos, methods="positive")
def _pos(b: Builder, input: Any) -> Any:
    return tensor(input)


@function(overwriting="square")
def _square(b: Builder, input: Any) -> Any:
    return b.elementwise(Op.MUL, tensor(input), input)


@function(operator.pow, overwriting="pow")
def _power(b: Builder, input: Any, exponent: Any) -> Any:
    x = tensor(input)
    if not _is_number(exponent) or exponent not in (2, 3):
        raise Cannot("only the powers 2 and 3 are fused")
    squared = b.elementwise(Op.MUL, x, x)
    return squared if exponent == 2 else b.elementwise(Op.MUL, squared, x)


@function(methods="addcmul")
def _addcmul(b: Builder, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return add(b, input, b.elementwise(Op.MUL, tensor(tensor1), tensor(tensor2)), alpha=value)


@function(operator.eq)
def _equal(b: Builder, left: Any, right: Any) -> bool:
    if isinstance(left, BatchSize | SameType) and left == right:
        return True
    raise Cannot("a comparison of tensors, or of the batch size with a number, is not fused")


@function(operator.ne)
def _unequal(b: Builder, left: Any, right: Any) -> bool:
    return not _equal(b, left, right)


@attribute("dtype", "device")
def _same_type(b: Builder, input: Any) -> SameType:
    return SameType()


layer_of(_pos, "", nn.Identity)
