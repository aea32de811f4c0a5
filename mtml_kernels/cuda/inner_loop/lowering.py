"""A schedule as instructions for one task: every part by its formula (schedule.kernels), views as views.

Planes lose their first dimension. Where a part sums over tasks, each task keeps its share, which goes on through what
is linear; the shares are added up after the launch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mtml_kernels.cuda.inner_loop.instructions import (
    Factor,
    Instruction,
    Memory,
    Operand,
    TensorAt,
    Unsupported,
    View,
    compact,
    in_rows,
)
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.schedule.call import ABSENT, Part, Plane, Source

__all__ = ["Lowering", "Unsupported", "lowers"]

Dims = tuple[int, ...]


Rule = Callable[["Lowering", Part], None]
_RULES: dict[str, Rule] = {}
# Through these a task's share of a sum goes on as its share.
_LINEAR = frozenset(
    {
        *("accumulate", "add.forward", "view", "transpose", "expand"),
        *("slice.forward", "slice.backward", "reduce", "scale", "stack"),
    }
)


def lowers(*kernels: str) -> Callable[[Rule], Rule]:
    """Registers the rule of kernels of the schedule."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kernels, rule))
        return rule

    return register


class Lowering:
    """The instructions of a schedule's parts. `results`: planes that the caller gets, which nobody may overwrite."""

    def __init__(
        self, planes: Sequence[Plane], parts: Sequence[Part], tasks: int, results: Iterable[int], dtype: torch.dtype
    ) -> None:
        self.planes, self.tasks, self.dtype = planes, tasks, dtype
        self.instructions: list[Instruction] = []
        self.arguments: dict[tuple[str, int], int] = {}  # of a source without its step: which tensor
        self.shares: set[int] = set()  # planes that are a task's share of a sum over tasks
        self.stacked: dict[int, list[int]] = {}
        self._views: dict[int, View] = {}
        self._loads: dict[object, View] = {}
        self._numbers = _numbers(planes, parts)
        self._last_read = {plane: at for at, part in enumerate(parts) for plane in part.reads}
        self._last_read.update(dict.fromkeys(results, len(parts)))
        self._at = 0
        for self._at, part in enumerate(parts):
            self._lower(part)

    def _lower(self, part: Part) -> None:
        rule = _RULES.get(part.kernel)
        if rule is None:
            raise Unsupported(f"{part.kernel} has no form in a thread block")
        self._mark_shares(part)
        rule(self, part)

    def _mark_shares(self, part: Part) -> None:
        if part.kernel == "zeros":  # every task's share of a sum that is 0
            self.shares.update(plane for plane in part.writes if self.tasks > 1 and not self.is_apart(plane))
            return
        reads = [plane for plane in part.reads if plane != ABSENT]
        shared = [plane for plane in reads if plane in self.shares]
        if shared and part.kernel not in _LINEAR:
            raise Unsupported(f"{part.kernel} of a sum over tasks")
        if shared and part.kernel in ("accumulate", "add.forward") and len(shared) < len(reads):
            raise Unsupported("a sum over tasks plus what is no such sum")
        if self.tasks == 1:
            return
        if part.kernel == "stack":  # of a thing a step
            self.shares.update(part.writes if shared else ())
            return
        apart = any(self.is_apart(plane) for plane in reads)
        for plane in part.writes:
            if plane != ABSENT and (shared or (apart and not self.is_apart(plane))):
                self.shares.add(plane)

    def is_apart(self, plane: int) -> bool:
        """Whether each task has its own."""
        shape = self.planes[plane].shape
        return self.tasks > 1 and len(shape) > 0 and shape[0] == self.tasks and not self.is_numbers(plane)

    def is_numbers(self, plane: int) -> bool:
        """Whether a plane is the update rule's numbers, or what flows to them."""
        return plane in self._numbers

    # --- planes as views ----------------------------------------------------------------------------------------------

    def shape(self, plane: int) -> Dims:
        """Of one task."""
        shape = self.planes[plane].shape
        return shape if self.is_numbers(plane) else tuple(shape[1:])

    def dtype_of(self, plane: int) -> torch.dtype:
        """Of its memory: numbers and what flows to them are of double precision whatever the program computes in."""
        return torch.float64 if self.is_numbers(plane) else self.planes[plane].dtype

    def view(self, plane: int) -> View:
        """A plane that is there."""
        if plane not in self._views:
            source = self.planes[plane].source
            if source is None:
                raise Unsupported(f"a plane that nothing writes: {self.planes[plane].name}")
            self._views[plane] = self.loaded(self._argument(plane, source))
        return self._views[plane]

    def loaded(self, view: View) -> View:
        """A matrix, or values, of the caller's on the chip, where they are read more than once and in whole vectors."""
        dtype = view.memory.dtype
        if view.memory.home is None or not 2 <= len(view.shape) <= 3 or dtype != self.dtype:
            return view
        key = view.memory.home, view.offset, view.shape, view.strides
        if key not in self._loads:
            self._loads[key] = in_rows(view.shape, dtype)
            self.copy(view, self._loads[key])
        return self._loads[key]

    def maybe(self, plane: int) -> View | None:
        """A plane, or None for an absent one."""
        return None if plane == ABSENT else self.view(plane)

    def _argument(self, plane: int, source: Source) -> View:
        p, shape = self.planes[plane], self.shape(plane)
        elements = math.prod(shape)
        tensor = self.arguments.setdefault((source.field, source.position), len(self.arguments))
        at = per_task = 0
        if source.step is not None:
            if source.field.startswith("support_") or not (self.is_apart(plane) or self._one_task(plane)):
                at = source.step * elements
            else:
                per_task = source.step * elements
        return compact(Memory(elements, p.dtype, TensorAt(tensor, at, per_task)), shape)

    def _one_task(self, plane: int) -> bool:
        """Of a batch of one: whether a plane that exists once a step would be the task's own in a larger one."""
        source = self.planes[plane].source
        return self.tasks == 1 and source is not None and source.field.startswith("grad_")

    def is_last_reader(self, plane: int) -> bool:
        """Whether no part after this one reads what lies where a plane does."""
        memory = self.view(plane).memory
        return all(
            self._last_read.get(other, self._at) <= self._at
            for other, view in self._views.items()
            if view.memory is memory
        )

    def alias(self, plane: int, view: View) -> None:
        """Say that a plane lies in a view."""
        self._views[plane] = view

    def new(self, plane: int) -> View | None:
        """Memory for a result; None where it is not wanted."""
        if plane == ABSENT:
            return None
        self._views[plane] = in_rows(self.shape(plane), self.dtype_of(plane))
        return self._views[plane]

    def scratch(self, shape: Dims, dtype: torch.dtype) -> View:
        """Memory for what is no plane."""
        return compact(Memory(math.prod(shape), dtype), shape)

    # --- instructions -------------------------------------------------------------------------------------------------

    def emit(self, instruction: Instruction) -> None:
        """One more."""
        if instruction.rows * instruction.cols > 0:
            self.instructions.append(instruction)

    def elements(
        self, op: ScheduleOp, reads: Iterable[View | None], writes: Sequence[View | None], group: int = 0, **more: Any
    ) -> None:
        """An instruction on the elements of its results."""
        (n, r, f), _ = next(view for view in writes if view is not None).padded()
        operands = tuple(operand_of(view, (n, r, f), group) for view in reads)
        results = tuple(operand_of(view, (n, r, f), group) for view in writes)
        self.emit(Instruction(op, n * r, f, operands, results, sample=r, group=group or f, **more))

    def copy(self, source: View | None, target: View, c0: float = 1.0, c1: float = 0.0) -> None:
        """target = c0 source + c1"""
        numbers = int(target.memory.dtype == torch.float64)
        self.elements(ScheduleOp.COPY, [source], [target], wholes=(numbers,), reals=(c0, c1))

    def copy_any(self, source: View | None, target: View) -> None:
        """target = source (0 where there is none), of whatever number of dimensions both have alike."""
        if len(target.shape) <= 3:
            self.copy(source, target)
            return
        for at in range(target.shape[0]):
            self.copy_any(None if source is None else source.part(at), target.part(at))

    def flat(self, view: View) -> View:
        """The same elements one after the other, copied where they are not."""
        found = view.reshaped((math.prod(view.shape),))
        if found is None:
            made = self.scratch(view.shape, view.memory.dtype)
            self.copy_any(view, made)
            found = made.reshaped((math.prod(view.shape),))
            assert found is not None
        return found

    def with_rows(self, view: View) -> View:
        """[N, R, F] as [N R, F], copied where that needs it."""
        (n, r, f), strides = view.padded()
        whole = dataclasses.replace(view, shape=(n, r, f), strides=strides)
        found = whole.reshaped((n * r, f))
        if found is None:
            made = in_rows((n, r, f), view.memory.dtype)
            self.copy(whole, made)
            found = made.reshaped((n * r, f))
            assert found is not None
        return found

    def matmul(self, out: View, pairs: Sequence[tuple[View, View]], depth: int, bias: View | None = None) -> None:
        """out [M, C] = sum of left [M, K] right [K, C] + bias [1, C]; with no pair the bias alone, or 0."""
        rows, cols = out.shape
        if not pairs or not depth:
            self.copy(bias, out, 1.0 if bias is not None else 0.0)
            return
        reads: list[Operand | None] = [None if bias is None else operand_of(bias, (1, 1, cols))]
        for left, right in pairs:
            reads += [matrix(left), matrix(right)]
        reads += [None] * (5 - len(reads))
        self.emit(
            Instruction(
                ScheduleOp.MATMUL,
                rows,
                cols,
                tuple(reads),
                (matrix(out),),
                sample=rows,
                wholes=(depth,),
                writes_first=True,
            )
        )

    def sum_of_products(
        self, out: View, shape: Sequence[int], points: tuple[int, int, int], terms: Sequence[Sequence[Factor]],
        scale: float = 1.0, gate: View | None = None, most: float = 0.0,
    ) -> None:  # fmt: skip
        """out [shape] = scale sum over points of the terms, each a product of factors; 0 unless gate < most."""
        n, r, f = shape
        if not terms:
            self.copy(None, out)
            return
        full = dataclasses.replace(out, shape=(n, r, f), strides=out.padded()[1]) if len(out.shape) != 3 else out
        self.emit(
            Instruction(
                ScheduleOp.SUM_OF_PRODUCTS, n * r, f, (operand_of(gate, (n, r, f)),), (operand_of(full, (n, r, f)),),
                sample=r, wholes=(), reals=(scale, most), points=points, terms=terms, writes_first=True,
            )
        )  # fmt: skip


def _numbers(planes: Sequence[Plane], parts: Sequence[Part]) -> frozenset[int]:
    """The planes of the update rule's numbers, and of what flows to them."""
    found = {i for i, plane in enumerate(planes) if plane.source is not None and plane.source.field == "hyper"}
    for part in parts:
        if part.kernel in ("update.adjoint", "update.unclip"):
            found.add(part.writes[-1])
        elif part.kernel in ("accumulate", "add.forward") and found.issuperset(part.reads):
            found.update(part.writes)
    return frozenset(found - {ABSENT})


def operand_of(view: View | None, space: tuple[int, int, int], group: int = 0) -> Operand | None:
    """A view broadcast to [N, R, F], whose features come in groups of `group`."""
    if view is None:
        return None
    (n, r, f), (sn, sr, sf) = view.padded()
    if (n not in (1, space[0])) or (r not in (1, space[1])):
        raise Unsupported(f"an operand of shape {view.shape} on {space}")
    if group and group < space[2]:
        if f == space[2]:
            return Operand(view.memory, view.offset, sn, sr, group * sf, sf)
        if f * group == space[2]:  # a statistic of each group
            return Operand(view.memory, view.offset, sn, sr, sf, 0)
    if f not in (1, space[2]):
        raise Unsupported(f"an operand of shape {view.shape} on {space}")
    return Operand(view.memory, view.offset, sn, sr, 0, sf)


def matrix(view: View) -> Operand:
    """[rows, cols]"""
    assert len(view.shape) == 2
    return Operand(view.memory, view.offset, 0, view.strides[0], 0, view.strides[1])


def turned(view: View) -> View:
    """[cols, rows]"""
    return dataclasses.replace(view, shape=view.shape[::-1], strides=view.strides[::-1])


def reduction(full: Sequence[int], kept: Sequence[int]) -> tuple[int, int, int]:
    """The points that a sum from [N, R, F] to `kept`, with 1 where it is summed, adds up."""
    n, r, f = (a if b == 1 else 1 for a, b in zip(full, kept, strict=True))
    return n, r, f


def factor_of(view: View, full: Sequence[int], kept: Sequence[int]) -> Factor:
    """A view broadcast to [N, R, F], by the element of a sum to `kept` and along its points."""
    n, r, f = full
    operand = operand_of(view, (n, r, f))
    assert operand is not None
    strides = operand.n, operand.r, operand.f
    of_result = [0 if one == 1 else s for s, one in zip(strides, kept, strict=True)]
    along = [s if one == 1 else 0 for s, one in zip(strides, kept, strict=True)]
    return Factor(Operand(operand.memory, operand.offset, of_result[0], of_result[1], 0, of_result[2]), *along)
