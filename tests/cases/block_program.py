"""Programs of a thread block read back from their words, and what each instruction touches, element by element.

Written from csrc/cuda/inner_loop alone: nothing of the lowering that made the words is asked. In float64, whose
elements are all 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mtml_kernels.cuda.inner_loop.instructions import Instruction as Lowered
from mtml_kernels.cuda.inner_loop.instructions import Memory
from mtml_kernels.cuda.inner_loop.words import HEAD_WORDS, OPERAND_WORDS
from mtml_kernels.cuda.inner_loop.words import ScheduleOp as Op

# How each operand of an instruction is used:
#   r w   read, written at the element
#   v     written once a row            o  written at one place
#   n N   eight numbers, read, written  c  a few, read by one thread
#   s     read somewhere in what the views of its elements span, by any thread
ROLES: dict[int, str] = {
    Op.MATMUL: "wsssss",
    Op.ACT_FORWARD: "rw",
    Op.ACT_BACKWARD: "rrw",
    Op.ACT_TWICE: "rrrrw",
    Op.ADDITION: "rrw",
    Op.MULTIPLICATION: "rrw",
    Op.TWO_PRODUCTS: "rrrrw",
    Op.COPY: "rw",
    Op.GRADIENT_STEP: "rrrw",
    Op.NORM_APPLY: "rrrrrww",
    Op.NORM_BACK: "rrrrrrw",
    Op.NORM_TANGENT: "rrrrrrrrww",
    Op.NORM_TWICE: "rrrrrrrrrrrrw",
    Op.RULE_STEP: "rrrnrrrwwww",
    Op.RULE_BACK: "rrrnrrrrrrrwwwwwwN",
    Op.LOOK_UP: "ssw",
    Op.SUM_OF_PRODUCTS: "wr",
    Op.MOMENTS: "ww",
    Op.ADD_UP_BY_ID: "ssw",
    Op.CLIP_SCALE: "nco",
    Op.CLIP_BACK: "ncccoN",
    Op.SOFTMAX_FORWARD: "sw",
    Op.SOFTMAX_BACKWARD: "ssw",
    Op.SOFTMAX_TANGENT: "ssw",
    Op.SOFTMAX_TWICE: "ssssw",
    Op.LOSS_FORWARD: "sssvw",
    Op.LOSS_TANGENT: "sssssw",
    Op.LOSS_DATA: "ssssswv",
    Op.SAMPLE_WEIGHTS: "ssvo",
    Op.SAMPLE_WEIGHTS_BACK: "ssssv",
}
ABSENT, FIRST_TENSOR = -1, 2
NUMBERS = 8
POINTS = 7  # words that say what is summed
SHARED, ONE = 1 << 40, 1 << 39  # the tags of what any thread of an instruction may touch, and one alone


class Instruction(NamedTuple):
    """words: its own, less its stages'."""

    op: int
    rows: int
    cols: int
    sample: int
    group: int
    words: list[int]
    stages: list[Instruction]

    @property
    def operands(self) -> list[list[int]]:
        """Base, at, per task, n, r, g, f of each."""
        count = len(ROLES[self.op])
        return [self.words[HEAD_WORDS + i * OPERAND_WORDS :][:OPERAND_WORDS] for i in range(count)]

    @property
    def rest(self) -> list[int]:
        """The words behind the operands."""
        return self.words[HEAD_WORDS + len(ROLES[self.op]) * OPERAND_WORDS :]


def instructions(words: Sequence[int]) -> list[Instruction]:
    """As they follow one another."""
    found, at = [], 0
    while at < len(words):
        op, count, stages, body, _, rows, cols, _, _, sample, _, _, group, *_ = words[at:]
        if op == Op.MATMUL:  # which has its layout and tiles there
            sample, group = rows, cols
        after = instructions(words[at + body : at + count])
        assert len(after) == stages
        found.append(Instruction(op, rows, cols, sample, group, list(words[at : at + body]), after))
        at += count
    return found


def phases_of(words: Sequence[int]) -> list[list[int]]:
    """The words of each phase's instructions."""
    found: list[list[int]] = []
    at, size = 0, None
    while at < len(words):
        assert size in (None, words[at])
        of_phase, count, size, _ = words[at : at + 4]
        end = at + 4
        for _ in range(count):
            end += words[end + 1]
        assert end <= at + of_phase and of_phase % 4 == 0
        found.append(list(words[at + 4 : end]))
        at += of_phase
    assert size in (None, 0)
    return found


def words_of(phases: Sequence[Sequence[int]]) -> list[int]:
    """The inverse."""
    sizes = [-(-(4 + len(phase)) // 4) * 4 for phase in phases]
    flat: list[int] = []
    for phase, size, after in zip(phases, sizes, [*sizes, 0][1:], strict=True):
        flat += [size, len(instructions(phase)), after, 0, *phase, *[0] * (size - 4 - len(phase))]
    return flat


def merged(phases: Sequence[Sequence[int]], at: int) -> list[list[int]]:
    """Without the barrier between the phases `at` and `at` + 1."""
    return [*map(list, phases[:at]), [*phases[at], *phases[at + 1]], *map(list, phases[at + 2 :])]


def lives(phases: Sequence[Sequence[Lowered]]) -> dict[Memory, tuple[int, int]]:
    """The first and the last phase that touch each memory of a task."""
    found: dict[Memory, tuple[int, int]] = {}
    for at, phase in enumerate(phases):
        for host in phase:
            for i in (host, *host.stages):
                for operand in (*i.read(), *i.written()):
                    if operand.memory.home is None:
                        first, _ = found.get(operand.memory, (at, at))
                        found[operand.memory] = first, at
    return found


# --- what is touched --------------------------------------------------------------------------------------------------


class Touched(NamedTuple):
    """Addresses, each with a tag: touches of one tag come one after the other, in a thread or by a warp's steps."""

    at: np.ndarray  # int64
    tag: np.ndarray  # int64
    writes: np.ndarray  # bool


def _address(operand: Sequence[int], tasks: int) -> int:
    base, at, per_task, *_ = operand
    return (base << 44) + at + per_task * tasks


def _elements(i: Instruction, operand: Sequence[int]) -> np.ndarray:
    """Of each element [rows, cols] its distance from the first."""
    *_, sn, sr, sg, sf = operand
    rows, cols = np.arange(i.rows, dtype=np.int64), np.arange(i.cols, dtype=np.int64)
    row = rows // i.sample * sn + rows % i.sample * sr
    return np.asarray((row[:, None] + (cols // i.group * sg + cols % i.group * sf)[None]).reshape(-1))


def _span(rows: int, row_step: int, cols: int, col_step: int) -> np.ndarray:
    return (np.arange(rows)[:, None] * row_step + np.arange(cols)[None] * col_step).reshape(-1)


def _factors(i: Instruction) -> Iterator[tuple[list[int], np.ndarray]]:
    """The factors of a sum, with what each reads."""
    rest = i.rest
    count, rest_size, _, _, f_size, *_ = rest
    terms = rest[POINTS] if i.op == Op.SUM_OF_PRODUCTS else 1
    factors = sum(rest[POINTS + 1 :][:terms]) if i.op == Op.SUM_OF_PRODUCTS else 1
    first = POINTS + 1 + (terms if i.op == Op.SUM_OF_PRODUCTS else 0) + 4
    points = np.arange(count, dtype=np.int64)
    n, within = points // rest_size, points % rest_size
    for at in range(factors):
        factor = rest[first + at * (OPERAND_WORDS + 3) :][: OPERAND_WORDS + 3]
        *operand, fn, fr, ff = factor
        along = n * fn + within // f_size * fr + within % f_size * ff
        yield operand, (_elements(i, operand)[:, None] + along[None]).reshape(-1)


def _somewhere(i: Instruction, which: int, operand: Sequence[int]) -> np.ndarray:
    """All that an operand of role s or c may be read at."""
    *_, sn, sr, _, sf = operand
    if i.op == Op.MATMUL:
        depth = i.rest[0]
        rows, cols = {1: (1, i.cols), 2: (i.rows, depth), 3: (depth, i.cols)}[1 if which == 1 else 2 + which % 2]
        return _span(rows, sr, cols, sf)
    if i.op == Op.LOOK_UP and which == 1:  # any row of the table
        return _span(i.rest[1], sr, i.cols, sf)
    if i.op == Op.ADD_UP_BY_ID:
        _, count, of_sample = i.rest[:3]
        row = np.arange(count)
        from_start = row // of_sample * sn + row % of_sample * sr
        features = np.arange(i.cols) * (sf if which == 0 else 0)
        return np.asarray((from_start[:, None] + features[None]).reshape(-1))
    if i.op in (Op.CLIP_SCALE, Op.CLIP_BACK):
        counts = [1, i.rest[0]] if i.op == Op.CLIP_SCALE else [1, 1, *i.rest[:2]]
        return np.arange(counts[which])
    return _elements(i, operand)


def _touches(i: Instruction, tasks: int, number: int) -> Iterator[Touched]:
    def touched(operand: Sequence[int], at: np.ndarray, tag: np.ndarray | int, writes: bool) -> Touched:
        tags = np.broadcast_to(np.asarray(tag, dtype=np.int64) + (number << 41), at.shape)
        return Touched(at.astype(np.int64) + _address(operand, tasks), tags, np.full(at.shape, writes))

    every = np.arange(i.rows * i.cols, dtype=np.int64)
    for which, (role, operand) in enumerate(zip(ROLES[i.op], i.operands, strict=True)):
        if operand[0] == ABSENT:
            continue
        if role in "rw":
            yield touched(operand, _elements(i, operand), every, role == "w")
        elif role == "v":
            yield touched(operand, _elements(i, operand)[:: i.cols], every[:: i.cols], True)
        elif role == "o":
            yield touched(operand, np.zeros(1), 0, True)
        elif role in "nN":
            yield touched(operand, np.arange(NUMBERS), ONE if role == "N" else SHARED, role == "N")
        else:
            yield touched(operand, _somewhere(i, which, operand), ONE if role == "c" else SHARED, False)
    if i.op in (Op.SUM_OF_PRODUCTS, Op.MOMENTS):
        for operand, at in _factors(i):
            yield touched(operand, at, SHARED, False)


def touched(phase: Sequence[int], tasks: int) -> Touched:
    """By all instructions of a phase; stages have their host's tags."""
    found = []
    for number, host in enumerate(instructions(phase)):
        for i in (host, *host.stages):
            found += [*_touches(i, tasks, number)]
    return Touched(*map(np.concatenate, zip(*found, strict=True)))


def hazards(phase: Sequence[int], tasks: int, by_all: bool = False) -> int:
    """Addresses that are written under one tag and touched under another.

    by_all: those alone that are read by what any thread may run, so that no dealing out of elements makes them right.
    """
    t = touched(phase, tasks)
    order = np.argsort(t.at, kind="stable")
    at, tag, writes = t.at[order], t.tag[order], t.writes[order]
    starts = np.flatnonzero(np.r_[True, at[1:] != at[:-1]])
    written = np.logical_or.reduceat(writes, starts)
    several = np.minimum.reduceat(tag, starts) != np.maximum.reduceat(tag, starts)
    shared = np.logical_or.reduceat(~writes & (tag & SHARED > 0), starts)
    return int((written & several & (shared | (not by_all))).sum())
