"""A placed program as 32-bit words (csrc/cuda/inner_loop/program.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from mtml_kernels.cuda.inner_loop.instructions import Factor, Instruction, Operand
from mtml_kernels.cuda.inner_loop.lowering import Unsupported
from mtml_kernels.cuda.inner_loop.placing import Placed
from mtml_kernels.cuda.inner_loop.words import FIRST_TENSOR, HEAD_WORDS, PHASE_WORDS, PLAIN, ScheduleOp

__all__ = ["Encoded", "encoded"]

_ABSENT, _ON_CHIP, _IN_WORKSPACE = -1, 0, 1


class Encoded(NamedTuple):
    """words: of all phases; first: of the first one; full: whether only the full kernel knows all instructions."""

    words: list[int]
    first: int
    phases: int
    full: bool


def divisor(d: int) -> list[int]:
    """What `Divisor` needs to divide by d: d, 2^(31 + shift) / d + 1 with d <= 2^shift, and the shift."""
    shift = max(0, (d - 1).bit_length())
    magic = (1 << (31 + shift)) // d + 1 if d > 1 else 0
    return [d, magic - (1 << 32) if magic >= 1 << 31 else magic, shift]


def _reals(values: Sequence[float]) -> list[int]:
    return [half for value in values for half in struct.unpack("<2i", struct.pack("<d", value))]


class _Writer:
    def __init__(self, placed: Placed) -> None:
        self.placed = placed

    def operand(self, operand: Operand | None) -> list[int]:
        if operand is None:
            return [_ABSENT, 0, 0, 0, 0, 0, 0]
        memory, offset, *strides = operand
        per_task, size = 0, memory.dtype.itemsize
        if memory.home is not None:
            base, at, per_task = FIRST_TENSOR + memory.home.tensor, memory.home.at, memory.home.per_task
        elif memory in self.placed.chip:
            base, at = _ON_CHIP, self.placed.chip[memory] // size
        else:
            base, at = _IN_WORKSPACE, self.placed.workspace[memory] // size
        return [base, at + offset, per_task, *strides]

    def factor(self, factor: Factor) -> list[int]:
        return [*self.operand(factor.operand), factor.n, factor.r, factor.f]

    def instruction(self, i: Instruction, turn: int) -> list[int]:
        body = [word for operand in i.operands for word in self.operand(operand)]
        if i.points is not None:
            _, r, f = i.points
            count = i.points[0] * r * f
            body += [count, *divisor(max(1, r * f)), *divisor(max(1, f))]
        body += i.wholes
        if i.op == ScheduleOp.SUM_OF_PRODUCTS:
            body += [len(i.terms), *(len(term) for term in i.terms)]
        body += _reals(i.reals)
        body += [word for term in i.terms for factor in term for word in self.factor(factor)]
        stages = [word for stage in i.stages for word in self.instruction(stage, 0)]
        start = HEAD_WORDS + len(body)
        head = [int(i.op), start + len(stages), len(i.stages), start, turn, i.rows]
        head += [*divisor(i.cols), *divisor(max(1, i.sample)), *divisor(max(1, i.group or i.cols))]
        return [*head, *body, *stages]


def encoded(phases: Sequence[Sequence[Instruction]], placed: Placed) -> Encoded:
    """A phase that has more words than the chip holds becomes several."""
    writer = _Writer(placed)
    found: list[tuple[int, list[int]]] = []
    for phase in phases:
        count, turn = 0, 0
        words: list[int] = []
        for instruction in phase:
            own = writer.instruction(instruction, turn)
            if 4 + len(own) > PHASE_WORDS:
                raise Unsupported(f"an instruction of {len(own)} words")
            if 4 + len(words) + len(own) > PHASE_WORDS - 3:
                found.append((count, words))
                count, words = 0, []
            count, words = count + 1, [*words, *own]
            turn += -(-instruction.rows * instruction.cols // 32) * 32
        found.append((count, words))
    sizes = [-(-(4 + len(words)) // 4) * 4 for _, words in found]
    flat: list[int] = []
    for (count, words), size, next_size in zip(found, sizes, [*sizes, 0][1:], strict=True):
        flat += [size, count, next_size, 0, *words, *[0] * (size - 4 - len(words))]
    ops = {each.op for phase in phases for host in phase for each in (host, *host.stages)}
    return Encoded(flat, sizes[0] if sizes else 0, len(found), not ops <= PLAIN)
