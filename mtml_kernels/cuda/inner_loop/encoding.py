"""A placed program as 32-bit words (csrc/cuda/inner_loop/program.h)."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from mtml_kernels.cuda.inner_loop.instructions import Factor, Instruction, Operand
from mtml_kernels.cuda.inner_loop.lowering import Unsupported
from mtml_kernels.cuda.inner_loop.placing import Placed
from mtml_kernels.cuda.inner_loop.words import FIRST_TENSOR, HEAD_WORDS, PHASE_WORDS, PLAIN, SERIAL_SUM, ScheduleOp

__all__ = ["Encoded", "encoded"]

_ABSENT, _ON_CHIP, _IN_WORKSPACE = -1, 0, 1
_ALONG_K, _ALONG_EDGE, _SCATTERED = 0, 1, 2  # `Along` of csrc/cuda/inner_loop/matmul.cuh
_BY_WARPS = frozenset({ScheduleOp.LOSS_FORWARD, ScheduleOp.LOSS_TANGENT, ScheduleOp.LOSS_DATA})


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
        head = [int(i.op), start + len(stages), len(i.stages), start, turn, i.rows, *divisor(i.cols)]
        head += self.product(i) if i.op == ScheduleOp.MATMUL else self.space(i)
        return [*head, *body, *stages]

    @staticmethod
    def space(i: Instruction) -> list[int]:
        """How elements are samples' rows and groups' features."""
        return [*divisor(max(1, i.sample)), *divisor(max(1, i.group or i.cols))]

    def product(self, i: Instruction) -> list[int]:
        """How the factors lie, and tiles in a row."""
        lie = [self.along(operand, k) for operand, k in zip(i.reads[1:], "frfr", strict=True) if operand is not None]
        a, b = lie[:2]
        alike = all(pair == (a, b) for pair in zip(lie[::2], lie[1::2], strict=True))
        whole = alike and _SCATTERED not in (a, b) and (a, b) != (_ALONG_EDGE, _ALONG_K)
        return [a | b << 2 | whole << 4, 0, 0, *divisor(-(-i.cols // 4) if whole else i.cols)]

    def along(self, factor: Operand, k: str) -> int:
        """In which direction four elements lie side by side on the chip, if in any; `k`: the name of its stride."""
        base, at, *_ = self.operand(factor)
        along_k, edge = (factor.f, factor.r) if k == "f" else (factor.r, factor.f)
        if base != _ON_CHIP or at % 4:
            return _SCATTERED
        if along_k == 1 and edge % 4 == 0:
            return _ALONG_K
        return _ALONG_EDGE if edge == 1 and along_k % 4 == 0 else _SCATTERED


def _threads_of(i: Instruction) -> int:
    """About how many threads have work: the next instruction begins with the one after them."""
    if i.op == ScheduleOp.MATMUL:
        return min(i.rows * i.cols, -(-i.rows // 2) * -(-i.cols // 4) * 4)
    if i.op == ScheduleOp.SUM_OF_PRODUCTS and i.points is not None:
        return i.rows * i.cols * (1 if math.prod(i.points) <= SERIAL_SUM else 32)
    return 32 * i.rows if i.op in _BY_WARPS else i.rows * i.cols


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
            turn += -(-_threads_of(instruction) // 32) * 32
        found.append((count, words))
    sizes = [-(-(4 + len(words)) // 4) * 4 for _, words in found]
    flat: list[int] = []
    for (count, words), size, next_size in zip(found, sizes, [*sizes, 0][1:], strict=True):
        flat += [size, count, next_size, 0, *words, *[0] * (size - 4 - len(words))]
    ops = {each.op for phase in phases for host in phase for each in (host, *host.stages)}
    return Encoded(flat, sizes[0] if sizes else 0, len(found), not ops <= PLAIN)
