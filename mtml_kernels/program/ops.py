"""The operations of the layer program: one row each, registered by the file in `layers` that builds and computes it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["OPS", "Computation", "Given", "Op", "OpInfo", "operation"]


class Op(enum.IntEnum):
    """Codes that more than the operation's own file names."""

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
    LINEAR_TRANSPOSED = 17  # a @ weight + bias


class Given(NamedTuple):
    """What one node computes its value from.

    operands: [N, rows, features] where batched, else [rows, features]; of INPUT and EMBEDDING the program's input
        [N, *].
    kind: the node's `b`, where that says which of several functions it is.
    weight, bias: [rows, cols] of the parameter's encoding, or None.
    constants: the node's own numbers, () where it has none.
    shape: that of the value.
    """

    operands: Sequence[Tensor]
    kind: int
    weight: Tensor | None
    bias: Tensor | None
    constants: tuple[float, ...]
    shape: tuple[int, ...]


Computation = Callable[[Given], Tensor]


class OpInfo(NamedTuple):
    """One operation.

    code, name: as csrc/include/mtml/program.h has them (there kName).
    compute: the value of a node, differentiable any number of times: the specification of every engine.
    operands: how many of `a` and `b` are values; `a` of an operation that reads an input is none.
    reads_input: `a` is the index of an input of the program.
    constants: how many numbers a node has, where it has any.
    mixing: the kinds (-1 where it has none) under which a sample's value depends on the others.
    label: the name of a node in `Program.describe` from its kind and constants; by default `name` alone.
    """

    code: int
    name: str
    compute: Computation
    operands: int = 1
    reads_input: bool = False
    constants: int = 0
    mixing: frozenset[int] = frozenset()
    label: Callable[[int, Sequence[float]], str] | None = None

    def called(self, kind: int, constants: Sequence[float]) -> str:
        """The node's name: `linear`, `tanh`, `conv2d 3x3 /2`, ..."""
        return self.name if self.label is None else self.label(kind, constants)


OPS: dict[int, OpInfo] = {}


def operation(info: OpInfo) -> OpInfo:
    """Add a row to the table. Raises ValueError where its code is taken."""
    if info.code in OPS:
        raise ValueError(f"operation {info.name}: the code {info.code} is that of {OPS[info.code].name}")
    OPS[info.code] = info
    return info
