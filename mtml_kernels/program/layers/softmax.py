"""Softmax and its logarithm over the features, or over the channels of images."""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import Node
from mtml_kernels.program.layers.shapes import rows_along
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, OpInfo, operation
from mtml_kernels.program.values import Value, tensor
from mtml_kernels.program.vocabulary import function, layer_of

__all__ = ["Softmax"]


class Softmax(enum.IntEnum):
    """By the codes of `enum SoftmaxKind` in csrc/include/mtml/program.h."""

    SOFTMAX = 0
    LOG_SOFTMAX = 1


def _compute(given: Given) -> Tensor:
    x = given.operands[0]
    return x.softmax(-1) if given.kind == Softmax.SOFTMAX else x.log_softmax(-1)


SOFTMAX = operation(
    OpInfo(16, "softmax", _compute, label=lambda kind, constants: Softmax(kind).name.lower())
).code  # fmt: skip


def _build(b: Builder, input: Any, kind: Softmax, dim: Any, dtype: Any) -> Value:
    x = tensor(input)
    if dim is None or dtype is not None:
        raise Cannot(f"{kind.name.lower()} without a dimension, or with a dtype, is not fused")
    source, image = rows_along(b, x, dim)
    form = b.node(source)
    node = Node(SOFTMAX, a=source, b=int(kind), rows=form.rows, features=form.features, batched=form.batched)
    return b.value(b.emit(Draft(node)), x.shape, x.lead, image=image)


@function(methods="softmax")
def _softmax(b: Builder, input: Any, dim: Any = None, dtype: Any = None) -> Any:
    return _build(b, input, Softmax.SOFTMAX, dim, dtype)


@function(methods="log_softmax")
def _log_softmax(b: Builder, input: Any, dim: Any = None, dtype: Any = None) -> Any:
    return _build(b, input, Softmax.LOG_SOFTMAX, dim, dtype)


@function(F.softmax)
def _functional(b: Builder, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(b, input, dim, dtype)


@function(F.log_softmax)
def _functional_log(b: Builder, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _log_softmax(b, input, dim, dtype)


@function(F.softmin)
def _softmin(b: Builder, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(b, b.affine(tensor(input), -1.0, 0.0), dim, dtype)


function(torch.special.softmax)(_softmax)
function(torch.special.log_softmax)(_log_softmax)
layer_of(_softmax, "dim", nn.Softmax)
layer_of(_log_softmax, "dim", nn.LogSoftmax)
layer_of(_softmin, "dim", nn.Softmin)
