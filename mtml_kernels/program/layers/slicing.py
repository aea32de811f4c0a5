"""Parts of a tensor: indexing, slices, chunks and splits along the dimensions of each sample."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

from mtml_kernels.program.activations import Act
from mtml_kernels.program.builder import Builder, Draft
from mtml_kernels.program.encoding import Node
from mtml_kernels.program.layers.shapes import inner_dimension
from mtml_kernels.program.obstacles import Cannot
from mtml_kernels.program.ops import Op, OpInfo, operation
from mtml_kernels.program.values import BatchSize, Value, as_int, tensor
from mtml_kernels.program.vocabulary import function, layer_of

__all__: list[str] = []

SLICE = operation(
    OpInfo(
        15,
        "slice",
        lambda g: g.operands[0][..., int(g.constants[0]) : int(g.constants[1])],
        constants=2,  # the first feature, and the one after the last
        label=lambda kind, constants: "slice {:.0f}:{:.0f}".format(*constants),
    )
).code


def _narrowed(b: Builder, value: Value, at: int, start: int, stop: int) -> Value:
    """Elements [start, stop) of dimension `at` of `value.shape`, which share its memory."""
    size = value.shape[at]
    if not 0 <= start < stop <= size:
        raise Cannot(f"elements {start} to {stop} of a dimension of {size}: an empty slice is not fused")
    if (start, stop) == (0, size):
        return value
    image = value.image and at == 0
    rows = value.points if image else (value.lead or 1) * math.prod(value.shape[:at])
    each = 1 if image else math.prod(value.shape[at + 1 :])
    source = value.node if image else b.matrix(value, rows, size * each)
    node = Node(SLICE, a=source, rows=rows, features=(stop - start) * each, batched=int(value.batched))
    emitted = b.emit(Draft(node, constants=(float(start * each), float(stop * each))))
    shape = (*value.shape[:at], stop - start, *value.shape[at + 1 :])
    return Value(emitted, shape, value.lead, value.memory, value.version, image=image)


class _Part(NamedTuple):
    """What one index leaves of a dimension; `kept`: the dimension itself."""

    start: int
    stop: int
    kept: bool = True


@function(operator.getitem)
def _getitem(b: Builder, input: Any, index: Any) -> Any:
    """x[:, 2:5], x[..., 0], x[:, None]: slices, numbers and new dimensions."""
    value = tensor(input)
    keys = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(key, Value | BatchSize) for key in keys):
        raise Cannot("indexing by a tensor is not fused")
    consumed = sum(key is not None and key is not Ellipsis for key in keys)
    if consumed > value.ndim:
        raise Cannot(f"{consumed} indices of a tensor {value}")
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    at = keys.index(Ellipsis)
    keys[at : at + 1] = [slice(None)] * (value.ndim - consumed)
    if value.batched and not _is_whole(keys.pop(0)):
        raise Cannot("it changes the batch dimension, or selects samples of the batch")
    return _indexed(b, value, keys)


def _is_whole(key: Any) -> bool:
    return isinstance(key, slice) and key in (slice(None), slice(0, None), slice(None, None, 1))


def _indexed(b: Builder, value: Value, keys: Sequence[Any]) -> Value:
    """By one key for each dimension of `value.shape`, and None for a new one."""
    shape, at, sizes = list[int](), 0, iter(value.shape)
    for key in keys:
        part = _Part(0, 1) if key is None else _part(next(sizes), key)
        if key is not None:
            value = _narrowed(b, value, at, part.start, part.stop)
            at += 1
        shape += [part.stop - part.start] * part.kept
    return b.reshape(value, value.lead, tuple(shape))


def _part(size: int, key: Any) -> _Part:
    if isinstance(key, int) and not isinstance(key, bool):
        if not -size <= key < size:
            raise Cannot(f"index {key} of a dimension of {size}")
        return _Part(key % size, key % size + 1, kept=False)
    if not isinstance(key, slice) or not all(end is None or type(end) is int for end in (key.start, key.stop)):
        raise Cannot(f"indexing by {key} is not fused (by numbers and slices it is)")
    if key.step not in (None, 1):
        raise Cannot("slices with a step are not fused")
    start, stop, _ = key.indices(size)
    return _Part(start, stop)


@function(methods="narrow")
def _narrow(b: Builder, input: Any, dim: int, start: int, length: int) -> Any:
    value = tensor(input)
    at = inner_dimension(value, dim)
    first = as_int(start) + (value.shape[at] if start < 0 else 0)
    return _narrowed(b, value, at, first, first + as_int(length))


@function(methods="select")
def _select(b: Builder, input: Any, dim: int, index: int) -> Any:
    value = tensor(input)
    at = inner_dimension(value, dim)
    return _indexed(b, value, [*[slice(None)] * at, index, *[slice(None)] * (len(value.shape) - at - 1)])


@function(methods="unbind")
def _unbind(b: Builder, input: Any, dim: int = 0) -> Any:
    value = tensor(input)
    return tuple(_select(b, value, dim, i) for i in range(value.shape[inner_dimension(value, dim)]))


def _parts(b: Builder, value: Value, dim: int, sizes: Sequence[int]) -> Iterator[Value]:
    at, start = inner_dimension(value, dim), 0
    if sum(sizes) != value.shape[at]:
        raise Cannot(f"parts of {list(sizes)} of a dimension of {value.shape[at]}")
    for size in sizes:
        yield _narrowed(b, value, at, start, start + size)
        start += size


def _equal_parts(total: int, size: int) -> list[int]:
    """Parts of this size, and a smaller one at the end where they do not fill the whole."""
    if size < 1:
        raise Cannot(f"parts of size {size}")
    return [min(size, total - start) for start in range(0, total, size)]


@function(methods="split")
def _split(
    b: Builder, input: Any, split_size_or_sections: Any = None, dim: int = 0, *, split_size: Any = None
) -> Any:  # fmt: skip
    value = tensor(input)
    given = split_size_or_sections if split_size is None else split_size
    total = value.shape[inner_dimension(value, dim)]
    sizes = [as_int(size) for size in given] if isinstance(given, list | tuple) else _equal_parts(total, as_int(given))
    return tuple(_parts(b, value, dim, sizes))


@function(methods="split_with_sizes")
def _split_with_sizes(b: Builder, input: Any, split_sizes: Any, dim: int = 0) -> Any:
    return _split(b, input, list(split_sizes), dim)


@function(methods="chunk")
def _chunk(b: Builder, input: Any, chunks: int, dim: int = 0) -> Any:
    value = tensor(input)
    total, count = value.shape[inner_dimension(value, dim)], as_int(chunks)
    if count < 1:
        raise Cannot(f"{count} chunks")
    return tuple(_parts(b, value, dim, _equal_parts(total, -(-total // count))))


@function(F.glu)
def _glu(b: Builder, input: Any, dim: int = -1) -> Any:
    """The first half times the sigmoid of the second."""
    value = tensor(input)
    if value.shape[inner_dimension(value, dim)] % 2:
        raise Cannot(f"two halves of {value} along dimension {dim}")
    first, second = _chunk(b, value, 2, dim)
    return b.elementwise(Op.MUL, first, b.act(Act.SIGMOID, second, ()))


layer_of(_glu, "dim", nn.GLU)
