"""The program of a thread block for calls of given shapes: there, and there and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtml_kernels.cuda.inner_loop import norm_rules, row_rules, rules, update_rules  # noqa: F401  register themselves
from mtml_kernels.cuda.inner_loop.encoding import Encoded, encoded
from mtml_kernels.cuda.inner_loop.instructions import Memory, TensorAt, View, compact
from mtml_kernels.cuda.inner_loop.lowering import Lowering, Unsupported
from mtml_kernels.cuda.inner_loop.phases import in_phases
from mtml_kernels.cuda.inner_loop.placing import Placed, placed
from mtml_kernels.cuda.inner_loop.words import MOST_TENSORS
from mtml_kernels.schedule.call import ABSENT, Part, Plane, Schedule

__all__ = ["Argument", "BlockProgram", "Result", "block_program", "parts_of"]


class Argument(NamedTuple):
    """A tensor that a program reads: a field of `InnerLoopArgs` or `Cotangents`, and the position in it."""

    field: str
    position: int
    dtype: torch.dtype
    stride: int | None  # elements from one task to the next; None: the tensor's own, whose first dimension they are


@dataclasses.dataclass(frozen=True)
class Result:
    """A tensor that a program writes: [*lead, T, *shape], a share of a sum over tasks apart in the parts [T, elements].

    at: of a share, its place in the parts; None where each task has its own.
    """

    lead: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int | None = None

    @functools.cached_property
    def elements(self) -> int:
        """Of one task."""
        return math.prod(self.shape)


class BlockProgram(NamedTuple):
    """tensors: the arguments, then the results that are wanted, then the parts, then the numbers' parts."""

    words: Encoded
    placed: Placed
    arguments: list[Argument]
    results: list[Result | None]  # as the schedule has them
    parts: int  # elements of a task's share of all sums
    number_parts: int
    widest: int  # elements of the largest instruction
    dtype: torch.dtype


class _Results:
    """Copies of results into the tensors of the call."""

    def __init__(self, lowering: Lowering, dtype: torch.dtype) -> None:
        self.lowering, self.dtype = lowering, dtype
        self.found: list[Result | None] = []
        self.parts = self.number_parts = 0
        self._targets: list[tuple[View | None, View, int]] = []  # (source, target without its tensor, which tensor)

    def add(self, plane: int, shared: bool) -> None:
        """A plane that the caller gets; `shared`: the tasks' sum of it."""
        if plane == ABSENT:
            self.found.append(None)
            return
        planes = self.lowering.stacked.get(plane, [plane])
        first = next(p for p in planes if p != ABSENT)
        shape, dtype = self.lowering.shape(first), self.lowering.dtype_of(first)
        lead = (len(planes),) if plane in self.lowering.stacked else ()
        if shared:
            self._share(plane, planes, lead, shape, dtype)
            return
        which, elements = len(self.found), math.prod(shape)
        for step, each in enumerate(planes):
            self._target(each, TensorAt(which, 0, step * elements), shape, dtype)
        self.found.append(Result(lead, shape, dtype))

    def _target(self, plane: int, home: TensorAt, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        target = compact(Memory(math.prod(shape), dtype, home), shape)
        self._targets.append((self.lowering.maybe(plane), target, home.tensor))

    def _share(
        self, plane: int, planes: Sequence[int], lead: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        numbers, elements = dtype != self.dtype, math.prod(shape)
        if self.lowering.tasks > 1 and plane not in self.lowering.shares:
            raise Unsupported("a gradient that does not depend on the tasks")
        at = self.number_parts if numbers else self.parts
        for step, each in enumerate(planes):
            self._target(each, TensorAt(-2 if numbers else -1, at + step * elements), shape, dtype)
        self.found.append(Result((), (*lead, *shape), dtype, at))
        if numbers:
            self.number_parts += len(planes) * elements
        else:
            self.parts += len(planes) * elements

    def write(self, first: int) -> None:
        """The copies, with tensors from `first` on: the results that are there, the parts, the numbers' parts."""
        position, at = {}, first
        for which, result in enumerate(self.found):
            if result is not None and result.at is None:
                position[which], at = at, at + 1
        position[-1], position[-2] = at, at + 1
        for source, target, which in self._targets:
            home = target.memory.home
            assert home is not None
            target.memory.home = home._replace(tensor=position[which])
            self.lowering.copy_any(source, target)


def block_program(
    planes: Sequence[Plane], parts: Sequence[Part], tasks: int, results: Sequence[tuple[int, bool]],
    dtype: torch.dtype, chip_bytes: int,
) -> BlockProgram:  # fmt: skip
    """Raises Unsupported, or TooLarge.

    results: planes, and whether the caller gets their sum over tasks.
    """
    lowering = Lowering(planes, parts, tasks, [plane for plane, _ in results], dtype)
    wanted = _Results(lowering, dtype)
    for plane, shared in results:
        wanted.add(plane, shared)
    arguments = [_argument(lowering, field, position) for field, position in lowering.arguments]
    wanted.write(len(arguments))
    if len(arguments) + len(wanted.found) + 2 > MOST_TENSORS:
        raise Unsupported(f"more than {MOST_TENSORS} tensors")
    phases = in_phases(lowering.instructions)
    where = placed(phases, chip_bytes)
    words = encoded(phases, where)
    widest = max((i.rows * i.cols for i in lowering.instructions), default=0)
    return BlockProgram(words, where, arguments, wanted.found, wanted.parts, wanted.number_parts, widest, dtype)


def _argument(lowering: Lowering, field: str, position: int) -> Argument:
    plane = next(p for p in range(len(lowering.planes)) if _is_of(lowering.planes[p], field, position))
    source = lowering.planes[plane].source
    assert source is not None
    stride: int | None = 0
    if lowering.is_apart(plane):
        steps_first = source.step is not None and not field.startswith("support_")
        stride = math.prod(lowering.shape(plane)) if steps_first else None
    return Argument(field, position, lowering.planes[plane].dtype, stride)


def _is_of(plane: Plane, field: str, position: int) -> bool:
    return plane.source is not None and plane.source.field == field and plane.source.position == position


def parts_of(*schedules: Schedule) -> list[Part]:
    """All parts, one schedule after the other."""
    return [part for schedule in schedules for call in schedule.calls for part in call.parts]
