"""Operations that change only a tensor's shape or where its elements lie, or ask for it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mtml_kernels.program.builder import Builder
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op, OpInfo, operation
from mtml_kernels.program.values import BatchSize, Value, dimension, fill, listed, tensor
from mtml_kernels.program.vocabulary import attribute, function, layer_of

__all__ = ["inner_dimension", "rows_along", "unsqueeze"]

operation(OpInfo(Op.VIEW, "view", lambda g: g.operands[0].reshape(g.shape)))
operation(OpInfo(Op.TRANSPOSE, "transpose", lambda g: g.operands[0].transpose(-1, -2)))


def _insides(value: Value) -> int:
    """Where the dimensions of one sample begin."""
    return 1 if value.batched else 0


def inner_dimension(value: Value, dim: object, extra: int = 0) -> int:
    """`dim` as an index into `value.shape`; the batch dimension itself is refused."""
    at = dimension(value, dim, extra) - _insides(value)
    if at < 0:
        raise Cannot("it changes the batch dimension")
    return at


def rows_along(b: Builder, value: Value, dim: object) -> tuple[int, bool]:
    """The node whose rows run along a dimension of each sample, and whether it is an image's."""
    at = inner_dimension(value, dim)
    if at == 0 and len(value.shape) > 1 and value.batched:
        return b.image(value), True
    if at != len(value.shape) - 1:
        raise Cannot(f"dimension {dim} of {value} is neither its features nor its channels")
    return b.matrix(value), False


@function(methods="reshape", only_methods="view")
def _view(b: Builder, input: Any, *size: Any, shape: Any = None) -> Any:
    return b.view(tensor(input), listed(size) if shape is None else list(shape))


@function(only_methods="view_as reshape_as")
def _view_as(b: Builder, input: Any, other: Any) -> Any:
    return b.view(tensor(input), tensor(other).sizes())


@function(methods="flatten")
def _flatten(b: Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    value = tensor(input)
    if value.ndim == 0:
        return b.reshape(value, 0, (1,))
    start, end = dimension(value, start_dim), dimension(value, end_dim)
    if start > end:
        raise Cannot(f"flatten from dimension {start_dim} to {end_dim}")
    if value.batched and start == 0:  # points move into the batch: [N, P, F] -> [N * P, F]
        return b.reshape(value, value.lead * math.prod(value.shape[:end]), value.shape[end:])
    start, end = start - _insides(value), end - _insides(value)
    merged = math.prod(value.shape[start : end + 1])
    return b.reshape(value, value.lead, (*value.shape[:start], merged, *value.shape[end + 1 :]))


@function(methods="unflatten")
def _unflatten(b: Builder, input: Any, dim: int, sizes: Any) -> Any:
    value = tensor(input)
    if value.batched and dimension(value, dim) == 0:
        return b.view(value, [*sizes, *value.shape])
    at = inner_dimension(value, dim)
    if not isinstance(sizes, list | tuple) or not all(isinstance(s, int) for s in sizes):
        raise Cannot("unflatten needs plain sizes")
    return b.reshape(value, value.lead, (*value.shape[:at], *fill(sizes, value.shape[at]), *value.shape[at + 1 :]))


@function(methods="squeeze")
def _squeeze(b: Builder, input: Any, dim: Any = None) -> Any:
    value = tensor(input)
    if dim is None and value.batched:
        raise Cannot("squeeze() without a dimension drops the batch dimension of a single sample; name it: squeeze(-1)")
    named = range(value.ndim) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    dims = [inner_dimension(value, d) for d in named]
    kept = tuple(s for i, s in enumerate(value.shape) if s != 1 or i not in dims)
    return b.reshape(value, value.lead, kept)


@function(methods="unsqueeze")
def unsqueeze(b: Builder, input: Any, dim: int) -> Any:
    """A dimension of one element before `dim`."""
    value = tensor(input)
    at = inner_dimension(value, dim, extra=1)
    return b.reshape(value, value.lead, (*value.shape[:at], 1, *value.shape[at:]))


@function(methods="permute")
def _permute(b: Builder, input: Any, *dims: Any) -> Any:
    """Dimensions of size 1 go anywhere; the others may be rotated, which is the transposition of a matrix."""
    value = tensor(input)
    order = [dimension(value, d) for d in listed(dims)]
    if sorted(order) != list(range(value.ndim)):
        raise Cannot(f"{listed(dims)} does not permute {value.ndim} dimensions")
    if value.param and not value.transposed and order == [1, 0]:
        return Value(-1, value.shape[::-1], 0, value.memory, value.version, value.param, transposed=True)
    if value.transposed and order == [1, 0]:
        return b.param(value.param)
    if value.batched and order[0] != 0:
        raise Cannot("it moves the batch dimension")
    inner = [d - _insides(value) for d in order[_insides(value) :]]
    moving = [d for d in inner if value.shape[d] != 1]
    still = sorted(moving)
    shape = tuple(value.shape[d] for d in inner)
    if moving == still:
        return b.reshape(value, value.lead, shape)
    count = still.index(moving[0])
    if moving != still[count:] + still[:count]:
        raise Cannot(f"transposing the elements of {value} is not fused (rotating its dimensions is)")
    turned = b.rotate(b.reshape(value, value.lead, tuple(value.shape[d] for d in still)), count)
    return b.reshape(turned, value.lead, shape)


@function(methods="transpose swapaxes")
def _transpose(b: Builder, input: Any, dim0: int, dim1: int) -> Any:
    value = tensor(input)
    order = list(range(value.ndim))
    first, second = dimension(value, dim0), dimension(value, dim1)
    order[first], order[second] = order[second], order[first]
    return _permute(b, value, order)


@attribute("T", "mT")
@function(methods="t")
def _t(b: Builder, input: Any) -> Any:
    """`.T`, `.mT`, `.t()` of a matrix; of fewer dimensions it is the tensor itself."""
    value = tensor(input)
    if value.ndim > 2:
        raise Cannot(f"the transpose of {value} is not fused")
    return _permute(b, value, [1, 0]) if value.ndim == 2 else value


@attribute("shape")
@function(only_methods="size")
def _size(b: Builder, input: Any, dim: int | None = None) -> Any:
    value = tensor(input)
    return value.sizes() if dim is None else value.sizes()[dimension(value, dim)]


@attribute("ndim")
@function(only_methods="dim")
def _ndim(b: Builder, input: Any) -> int:
    return tensor(input).ndim


@function(methods="numel", only_methods="nelement")
def _numel(b: Builder, input: Any) -> Any:
    value = tensor(input)
    return BatchSize(value.elements) if value.batched else value.elements


layer_of(_flatten, "start_dim end_dim", nn.Flatten)
layer_of(_unflatten, "dim unflattened_size", nn.Unflatten)
