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

__all__ = ["ABSENT", "VIEWS", "Call", "Part", "Plane", "Schedule", "Source", "by_role", "by_tensor"]

Item = TypeVar("Item")
VIEWS = frozenset({"view", "transpose", "expand"})  # kernels that look at their operand's memory in another way
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
    def kept_bytes(self) -> int:
        """Of the planes that a later schedule reads."""
        return sum(self.planes[i].bytes for i in self.kept)

    @functools.cached_property
    def peak_bytes(self) -> int:
        """The most memory that its planes take at a time, neither arguments counted nor what an earlier schedule left.

        A view has none of its own, and keeps that of what it looks at. While a call makes a gradient of all tasks,
        there is a share of each task's. A provider's pieces of gradients are not counted: they hold a
        quarter of the numbers that their products read, at most.
        """
        live = peak = 0
        lies: dict[int, int] = {}  # by plane: in whose memory it is
        names: dict[int, int] = {}  # of that memory: how many planes lie in it
        for call in self.calls:
            for part in call.parts:
                fresh = part.kernel not in VIEWS and part.kernel != "accumulate"
                for plane in part.writes:
                    if plane != ABSENT:
                        own = plane if fresh else lies.get(part.reads[0], part.reads[0])
                        lies[plane], names[own] = own, names.get(own, 0) + 1
                        live += self.planes[plane].bytes if fresh else 0
            peak = max(peak, live + sum(map(self._shares, call.parts)))
            for own in (lies[plane] for plane in call.drops if plane in lies):
                names[own] -= 1
                live -= self.planes[own].bytes if own in lies and not names[own] else 0
        return peak

    def _shares(self, part: Part) -> int:
        """Bytes of the tasks' shares of a product's gradients of all tasks."""
        if not getattr(part.constants, "over_tasks", False):
            return 0
        tasks = max(self.planes[i].shape[0] for i in part.reads if i != ABSENT)
        return tasks * sum(self.planes[i].bytes for i in part.writes[1:] if i != ABSENT)
