"""What a block's program does, read back from its words (csrc/cuda/inner_loop/program.h)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtml_kernels.cuda.inner_loop.encoding import Encoded
from mtml_kernels.cuda.inner_loop.words import HEAD_WORDS, OPERAND_WORDS, ScheduleOp

__all__ = ["Work", "macs_of", "phases_of"]

_ABSENT = -1
_OP, _WORDS, _STAGES, _BODY, _, _ROWS, _COLS = range(7)
_OPERANDS_OF_A_PRODUCT, _SECOND_LEFT = 6, 4


class Work(NamedTuple):
    """An instruction: of a product its depth, and how many pairs of factors it adds up; `stages`: those that follow."""

    op: ScheduleOp
    rows: int
    cols: int
    depth: int
    pairs: int
    stages: tuple[ScheduleOp, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of a product."""
        return self.rows * self.cols * self.depth * self.pairs

    def __str__(self) -> str:
        depth = f" of {self.pairs} x {self.depth}" if self.pairs else ""
        after = "".join(f" + {stage.name.lower()}" for stage in self.stages)
        return f"{self.op.name.lower()} {self.rows} x {self.cols}{depth}{after}"


def _stages(words: Sequence[int]) -> Iterator[ScheduleOp]:
    at = words[_BODY]
    for _ in range(words[_STAGES]):
        yield ScheduleOp(words[at + _OP])
        at += words[at + _WORDS]


def _work(words: Sequence[int]) -> Work:
    op, depth, pairs = ScheduleOp(words[_OP]), 0, 0
    if op == ScheduleOp.MATMUL:
        depth = words[HEAD_WORDS + _OPERANDS_OF_A_PRODUCT * OPERAND_WORDS]
        pairs = 1 if words[HEAD_WORDS + _SECOND_LEFT * OPERAND_WORDS] == _ABSENT else 2
    return Work(op, words[_ROWS], words[_COLS], depth, pairs, tuple(_stages(words)))


def phases_of(encoded: Encoded) -> list[list[Work]]:
    """Every phase's instructions."""
    found, at, size = [], 0, encoded.first
    while size:
        _, count, following, _ = encoded.words[at : at + 4]
        found.append(list[Work]())
        own = at + 4
        for _ in range(count):
            length = encoded.words[own + _WORDS]
            found[-1].append(_work(encoded.words[own : own + length]))
            own += length
        at, size = at + size, following
    return found


def macs_of(encoded: Encoded) -> int:
    """Multiply-adds of all products of a task."""
    return sum(work.macs for phase in phases_of(encoded) for work in phase)
