"""What a block's program is made of before it is placed and encoded: memory, views of it, instructions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mtml_kernels.cuda.inner_loop.words import ScheduleOp

__all__ = ["Factor", "Instruction", "Memory", "Operand", "TensorAt", "Unsupported", "View", "compact", "in_rows"]

Dims = tuple[int, ...]


class Unsupported(ValueError):
    """What a block's program cannot do, in words."""


class TensorAt(NamedTuple):
    """A place in a tensor of the call: its position among them, elements from a task's start, and that many times the
    number of tasks.
    """

    tensor: int
    at: int = 0
    per_task: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Memory:
    """A task's share of a plane: `elements` on the chip or in the workspace, or in a tensor of the call."""

    elements: int
    dtype: torch.dtype
    home: TensorAt | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A plane of one task: its shape and strides without the tasks."""

    memory: Memory
    shape: Dims
    strides: Dims
    offset: int = 0

    def reshaped(self, shape: Dims) -> View | None:
        """The same elements in another shape, None where that needs a copy."""
        if shape == self.shape:
            return self
        form = torch.empty_strided(self.shape, self.strides, device="meta")
        try:
            return dataclasses.replace(self, shape=shape, strides=tuple(form.view(shape).stride()))
        except RuntimeError:
            return None

    def part(self, at: int) -> View:
        """Without its first dimension, at a place in it."""
        offset = self.offset + at * self.strides[0]
        return dataclasses.replace(self, shape=self.shape[1:], strides=self.strides[1:], offset=offset)

    def padded(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(shape, strides) as [samples, rows, features], from the right; of more dimensions the first ones are one."""
        if len(self.shape) > 3:
            merged = self.reshaped((math.prod(self.shape[:-2]), *self.shape[-2:]))
            if merged is None:
                raise Unsupported(f"values of shape {self.shape} whose dimensions are no samples of rows")
            return merged.padded()
        missing = 3 - len(self.shape)
        n, r, f = (1,) * missing + self.shape
        sn, sr, sf = (0,) * missing + self.strides
        return (n, r, f), (sn if n > 1 else 0, sr if r > 1 else 0, sf if f > 1 else 0)


def compact(memory: Memory, shape: Dims) -> View:
    """All of a memory, in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return View(memory, shape, tuple(strides[::-1]))


def row_length(features: int) -> int:
    """From one row to the next on the chip: an odd number of vectors of four, so that neighbouring rows, which are read
    at once, lie in different banks. Rows that are shorter than a vector follow each other.
    """
    return features if features < 4 else 4 * (-(-features // 4) | 1)


def in_rows(shape: Dims, dtype: torch.dtype) -> View:
    """New memory, row by row; of more than [samples, rows, features], which no product reads, element by element."""
    if not 2 <= len(shape) <= 3:
        return compact(Memory(math.prod(shape), dtype), shape)
    length = row_length(shape[-1])
    strides = compact(Memory(0, dtype), (*shape[:-1], length)).strides
    return View(Memory(math.prod(shape[:-1]) * length, dtype), shape, strides)


class Operand(NamedTuple):
    """A memory and the distances of elements along samples, rows, groups and features of a group."""

    memory: Memory
    offset: int
    n: int
    r: int
    g: int
    f: int


class Factor(NamedTuple):
    """An operand by the element of the result, and along samples, rows and features of what is summed."""

    operand: Operand
    n: int
    r: int
    f: int


@dataclasses.dataclass(eq=False, slots=True)
class Instruction:
    """One of `ScheduleOp`, on [rows, cols] of which `sample` rows are one sample and `group` columns one group.

    reads, writes: its operands in their order, None for an absent one. points: how many samples, rows and features are
    summed; terms: the factors of each.
    """

    op: ScheduleOp
    rows: int
    cols: int
    reads: tuple[Operand | None, ...]
    writes: tuple[Operand | None, ...]
    sample: int = 1
    group: int = 0  # 0: cols
    wholes: tuple[int, ...] = ()
    reals: tuple[float, ...] = ()
    points: tuple[int, int, int] | None = None
    terms: Sequence[Sequence[Factor]] = ()
    writes_first: bool = False
    stages: list[Instruction] = dataclasses.field(default_factory=list)

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """In the order in which they are encoded."""
        return (*self.writes, *self.reads) if self.writes_first else (*self.reads, *self.writes)

    def read(self) -> Iterator[Operand]:
        """What is read, factors included."""
        yield from (operand for operand in self.reads if operand is not None)
        yield from (factor.operand for term in self.terms for factor in term)

    def written(self) -> Iterator[Operand]:
        """What is written."""
        return (operand for operand in self.writes if operand is not None)
