"""Instructions in phases between barriers, and those on elements as stages of what they follow.

Memory, not planes, decides the order: what is read comes after what wrote it, what is overwritten after what read it.
Two that touch different stretches of a memory (the squares of a norm, the parts of a stack) may go at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mtml_kernels.cuda.inner_loop.instructions import Instruction, Memory, Operand
from mtml_kernels.cuda.inner_loop.words import ScheduleOp

__all__ = ["in_phases"]

_ON_ELEMENTS = frozenset(range(ScheduleOp.ACT_FORWARD, ScheduleOp.LOOK_UP + 1))
_WRITE_BY_ELEMENT = frozenset({ScheduleOp.MATMUL, ScheduleOp.SUM_OF_PRODUCTS})
MOST_STAGES = 6


@dataclasses.dataclass(slots=True)
class _Use:
    """Of a memory: by which instruction (with its stages) in which phase."""

    host: Instruction
    operand: Operand
    reach: range | None  # elements of the memory; None: any
    writes: bool


class _Phases:
    def __init__(self) -> None:
        self.phase: dict[Instruction, int] = {}
        self.order: list[Instruction] = []
        self.uses: dict[Memory, list[_Use]] = {}

    def add(self, instruction: Instruction) -> None:
        """In the first phase in which it may run, or as a stage of one before it."""
        conflicts = self._conflicts(instruction)
        last = max((self.phase[use.host] for use, _ in conflicts), default=-1)
        host = self._host(instruction, [pair for pair in conflicts if self.phase[pair[0].host] == last])
        if host is None:
            host = instruction
            self.phase[instruction] = last + 1
            self.order.append(instruction)
        else:
            host.stages.append(instruction)
        for operand, writes in _operands(instruction):
            use = _Use(host, operand, _reach(instruction, operand, writes), writes)
            self.uses.setdefault(operand.memory, []).append(use)

    def put_off_loads(self) -> None:
        """What is copied from the caller's tensors comes in the phase before it is read: before, it takes no room."""
        for load in self.order:
            if load.op == ScheduleOp.COPY and self.phase[load] == 0 and not load.stages:
                (target,) = load.written()
                later = [self.phase[use.host] for use in self.uses[target.memory] if use.host is not load]
                if later and all(operand.memory.home is not None for operand in load.read()):
                    self.phase[load] = max(0, min(later) - 1)

    def _conflicts(self, instruction: Instruction) -> list[tuple[_Use, Operand]]:
        """Earlier uses of the same stretch of a memory of which one of the two writes."""
        found = []
        for operand, writes in _operands(instruction):
            reach = _reach(instruction, operand, writes)
            for use in self.uses.get(operand.memory, ()):
                if (writes or use.writes) and _meet(reach, use.reach):
                    found.append((use, operand))
        return found

    def _host(self, instruction: Instruction, conflicts: Sequence[tuple[_Use, Operand]]) -> Instruction | None:
        """What it may follow within one thread: all it waits for in that phase are the same elements there."""
        hosts = {use.host for use, _ in conflicts}
        if len(hosts) != 1 or instruction.op not in _ON_ELEMENTS:
            return None
        (host,) = hosts
        if host.op != ScheduleOp.MATMUL and host.op not in _ON_ELEMENTS:
            return None
        if (host.rows, host.cols) != (instruction.rows, instruction.cols) or len(host.stages) >= MOST_STAGES:
            return None
        if all(_same(host, use.operand, instruction, operand) for use, operand in conflicts):
            return host
        return None


def _operands(instruction: Instruction) -> list[tuple[Operand, bool]]:
    return [*((o, False) for o in instruction.read()), *((o, True) for o in instruction.written())]


def _reach(instruction: Instruction, operand: Operand, writes: bool) -> range | None:
    """From the first to the last element that an operand is touched at; None where its elements do not say it."""
    by_element = instruction.op in _ON_ELEMENTS and instruction.op != ScheduleOp.LOOK_UP
    if not (by_element or (writes and instruction.op in _WRITE_BY_ELEMENT)) or min(operand[2:]) < 0:
        return None
    group = instruction.group or instruction.cols
    rows, cols, sample = instruction.rows - 1, instruction.cols - 1, instruction.sample
    steps = rows // sample, min(rows, sample - 1), cols // group, min(cols, group - 1)
    last = sum(step * stride for step, stride in zip(steps, operand[2:], strict=True))
    return range(operand.offset, operand.offset + last + 1)


def _meet(a: range | None, b: range | None) -> bool:
    return a is None or b is None or (a.start < b.stop and b.start < a.stop)


def _same(a: Instruction, of_a: Operand, b: Instruction, of_b: Operand) -> bool:
    """Whether an element of [rows, cols] is one place in both operands, and no two elements are one."""
    by_element = any(of_a is w for w in a.writes) or any(of_a in stage.operands for stage in a.stages)
    if a.op == ScheduleOp.MATMUL and not by_element:
        return False  # rows and columns of a factor
    return _lie(a, of_a) == _lie(b, of_b) and _covers(b, of_b)


def _lie(instruction: Instruction, operand: Operand) -> tuple[int, ...]:
    """Offset and the strides that matter: of rows (within a sample, between samples) and columns."""
    rows, sample = instruction.rows, instruction.sample
    group = instruction.group or instruction.cols
    n = operand.n if rows > sample else 0
    r = operand.r if sample > 1 else 0
    g = operand.g if instruction.cols > group else 0
    f = operand.f if group > 1 else 0
    if instruction.op == ScheduleOp.MATMUL or (rows > sample > 1 and n == r * sample) or sample == rows:
        row = operand.r if rows > 1 else 0
        return operand.offset, row, row, f if g in (0, f * group) else g
    if sample == 1:
        return operand.offset, n, n, f if g in (0, f * group) else g
    return operand.offset, n, r, f if g in (0, f * group) else g


def _covers(instruction: Instruction, operand: Operand) -> bool:
    _, n, r, f = _lie(instruction, operand)
    return (instruction.rows == 1 or (n != 0 and r != 0)) and (instruction.cols == 1 or f != 0)


def in_phases(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Phases of instructions, with their stages."""
    phases = _Phases()
    for instruction in instructions:
        phases.add(instruction)
    phases.put_off_loads()
    count = max(phases.phase.values(), default=-1) + 1
    found: list[list[Instruction]] = [[] for _ in range(count)]
    for instruction in phases.order:
        found[phases.phase[instruction]].append(instruction)
    return found
