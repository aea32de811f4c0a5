"""What a schedule is made of: planes of memory, parts that read and write them, and calls, each of which is one launch.

A *part* is the smallest step there is: one node of the layer program in one direction, an update of one tensor. A
*call* is a group of parts that one kernel can do: a product with the activation before and after it, its weight
gradient and the step along that. A provider runs a call as one kernel where it has it, else its parts one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["ABSENT", "Call", "Part", "Plane", "Schedule", "Source", "by_role", "by_tensor"]

Item = TypeVar("Item")
ABSENT = -1  # in place of a plane: an operand that a part does without, a result that nobody reads


class Source(NamedTuple):
    """Where an argument of the call lies: a field of `InnerLoopArgs` or `Cotangents`, the position in it where that is
    a list, and of what exists once a step the step.
    """

    field: str
    position: int = 0
    step: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Plane:
    """A tensor of the schedule.

    Values, their cotangents and tangents are [T, N, rows, features], with 1 in place of T where all tasks share one and
    in place of N where it is computed from parameters alone; parameters, their gradients and moments [T or 1, rows,
    cols] as they are stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str  # for people: what it is, and of which node or parameter
    source: Source | None = None  # an argument, which is not written

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.elements * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One kernel's work: `kernel` names a row of `kernels.KERNELS`, whose roles are those of `reads` and `writes`."""

    kernel: str
    reads: tuple[int, ...]  # planes, ABSENT where it does without one
    writes: tuple[int, ...]  # planes, ABSENT where the result is not wanted
    constants: Any = None

    @property
    def wants(self) -> tuple[bool, ...]:
        """Which results are wanted."""
        return tuple(plane != ABSENT for plane in self.writes)


def by_tensor(items: Sequence[Item], roles: int) -> list[tuple[Item, ...]]:
    """What a part has of several tensors, role after role, as one tuple a tensor."""
    count = len(items) // roles
    return list(zip(*(items[at : at + count] for at in range(0, roles * count, max(count, 1))), strict=True))


def by_role(tensors: Sequence[Sequence[Item]]) -> list[Item]:
    """The inverse of `by_tensor`."""
    return [item for role in zip(*tensors, strict=True) for item in role]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One launch. `where` says in the words of the program what it does, `drops` which planes nobody reads after it."""

    parts: tuple[Part, ...]
    where: str
    drops: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its parts' names, less those that move nothing."""
        return " + ".join(dict.fromkeys(part.kernel for part in self.parts))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The calls of one direction, in the order in which they run.

    `results` are the planes that the caller gets, in an order that whoever made the schedule knows; ABSENT stands for
    one that is not there. `kept`: planes that a later schedule (the way back) reads from this one.
    """

    planes: tuple[Plane, ...]
    calls: tuple[Call, ...]
    results: tuple[int, ...]
    kept: tuple[int, ...] = ()

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The most memory that its planes take at a time, arguments not counted."""
        live = peak = 0
        for call in self.calls:
            live += sum(self.planes[i].bytes for part in call.parts for i in part.writes if i != ABSENT)
            peak = max(peak, live)
            live -= sum(self.planes[i].bytes for i in call.drops)
        return peak
