"""Embeddings: rows of a table at the ids of an input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import Node
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Given, Op, OpInfo, operation
from mtml_kernels.program.values import Value, tensor
from mtml_kernels.program.vocabulary import Weights, function, layer

__all__: list[str] = []


def _compute(given: Given) -> Tensor:
    assert given.weight is not None
    padding = given.constants[0]
    ids = given.operands[0].reshape(given.shape[:-1])  # [N, rows]
    return F.embedding(ids, given.weight, None if padding < 0 else int(padding))


operation(OpInfo(Op.EMBEDDING, "embedding", _compute, operands=0, reads_input=True, constants=2))


def _build(b: Builder, ids: Value, table: Value, padding: int) -> Value:
    """Rows of a parameter [V, E]; `padding`: the id whose row takes no gradient, or -1."""
    if not table.param or table.transposed or len(table.shape) != 2:
        raise Cannot("the table of an embedding must be a parameter [V, E] itself, not a value computed from one")
    source = b.input_of(ids)
    if source < 0:
        raise Cannot("the ids of an embedding must be an input itself, or a view of one")
    b.read_as_table(table.param)
    node = Node(Op.EMBEDDING, a=source, rows=ids.elements, features=table.shape[1])
    draft = Draft(node, weight=table.param, constants=(float(padding), 0.0))
    return b.value(b.emit(draft), (*ids.shape, table.shape[1]), ids.lead)


@function(F.embedding)
def _embedding(
    b: Builder, input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if max_norm is not None:
        raise Cannot("an embedding with max_norm is not fused: it changes its weight in forward")
    if scale_grad_by_freq or sparse:
        option = "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
        raise Cannot(f"an embedding with {option}=True is not fused")
    ids, table = tensor(input), tensor(weight)
    padding = -1 if padding_idx is None else padding_idx + (table.shape[0] if padding_idx < 0 else 0)
    return _build(b, ids, table, padding)


@function(torch.embedding)
def _torch_embedding(
    b: Builder, weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:  # fmt: skip
    padding = padding_idx if padding_idx >= 0 else None  # -1 is none to this function
    return _embedding(b, indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


@layer(nn.Embedding)
def _layer(b: Builder, m: Any, weights: Weights, input: Any) -> Any:
    options = (m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
    return _embedding(b, input, weights(m.weight), *options)
