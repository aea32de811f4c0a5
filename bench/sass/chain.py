"""How long one program takes that has a multiprocessor to itself: its warps issue in order and wait for operands.

Each of four warps has a scheduler; all run the same way, and share what moves words between registers and memory.
An instruction is issued when the one before it was, its unit is free and its operands are there:

    issue  = max(previous issue + 1, unit free, operands ready)        ready(result) = issue + latency

Loads into shared memory (LDGSTS) are waited for by DEPBAR, products of warp groups by WARPGROUP.DEPBAR. Loops go round
three times; further rounds take as long as the third.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.sass.chips import ALU_LANES, MEMORY_WORDS, SCHEDULERS, SPECIAL_LANES, Chip
from bench.sass.counting import LANES, matrix_macs, pipe_of, words_of
from bench.sass.listing import Instruction
from bench.sass.paths import Node, Repeat

__all__ = ["clocks_of", "latency_of", "names_in", "reads_of", "results_of"]

ROUNDS = 3
_NAME = re.compile(r"\b(U?R|U?P)(\d+)(\.64)?\b")
_RESULTLESS = frozenset({"ST", "STS", "STG", "STSM", "STL", "BRA", "BRX", "EXIT", "BAR", "NOP", "LDGSTS", "LDGDEPBAR"})
_DOUBLE = frozenset({"DADD", "DMUL", "DFMA"})
_ACCUMULATOR, _LEFT = 4, 4  # registers of HMMA's results and of its left operand; two of the right one


class _Use(NamedTuple):
    """What an instruction needs and gives: registers and predicates by name, its unit, clocks there, clocks to wait."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    unit: str
    busy: float
    latency: float
    kind: str  # of what is waited for in groups: "start", "close", "wait"; "" of all others
    products: bool  # the groups are of products, not of copies


def names_in(word: str, width: int = 1) -> Iterator[str]:
    """Registers of an operand; `width` of them in a row."""
    for kind, number, pair in _NAME.findall(word):
        many = 2 if pair and width == 1 else width
        yield from (f"{kind}{int(number) + i}" for i in range(1 if kind.endswith("P") else many))


def results_of(one: Instruction) -> tuple[int, int]:
    """(how many operands are results, registers of the first)"""
    if one.base in _RESULTLESS or not one.operands:
        return 0, 0
    count = 1
    while count < len(one.operands) and re.fullmatch(r"U?P(\d+|T)", one.operands[count]):
        count += 1
    if one.base in ("SHFL", "ATOMG"):  # whether the lane was there, and its value
        return 2, 1
    pair = one.base == "CS2R" or one.base in _DOUBLE or one.opcode.startswith("F2F.F64")
    width = _ACCUMULATOR if one.base == "HMMA" else 2 if pair else words_of(one)
    return count, 0 if one.base == "HGMMA" else width


def reads_of(one: Instruction) -> tuple[str, ...]:
    """Registers and predicates that an instruction reads."""
    sources = one.operands[results_of(one)[0] :]
    widths = [1] * len(sources)
    if one.base == "HMMA":
        widths = [_LEFT, 2, _ACCUMULATOR, *widths][: len(sources)]
    elif one.base in ("ST", "STS", "STG") and sources:
        widths[-1] = words_of(one)
    names = [name for word, many in zip(sources, widths, strict=True) for name in names_in(word, many)]
    return (*names, *names_in(one.guard))


def latency_of(one: Instruction, pipe: str, chip: Chip, far: int) -> float:
    """Clocks until the result is there; `far`: those of global memory."""
    times = chip.latencies
    by_opcode = {
        "LDG": far,
        "LDGSTS": far,
        "ATOMG": far,
        "MEMBAR": times.memory,
        "SHFL": times.shuffle,
        "REDUX": times.shuffle,
        "BAR": times.barrier,
        "S2R": times.special_register,
        "S2UR": times.special_register,
        "LDC": times.constant,
        "ULDC": times.constant,
    }
    if one.base in by_opcode:
        return by_opcode[one.base]
    return {"special": times.special, "memory": times.shared, "matrix": times.matrix}.get(pipe, times.arithmetic)


def _busy(one: Instruction, pipe: str, chip: Chip, warps: int) -> float:
    """Clocks for which a warp's instruction holds its unit; memory is all warps' own."""
    rate = chip.matrix_macs * (chip.synchronous if one.base == "HMMA" else 1.0) / SCHEDULERS
    clocks = {
        "fma": LANES * SCHEDULERS / chip.fma_lanes,
        "mad": LANES * SCHEDULERS / ALU_LANES,
        "alu": LANES * SCHEDULERS / ALU_LANES,
        "special": LANES * SCHEDULERS / SPECIAL_LANES,
        "memory": warps * words_of(one) * LANES / MEMORY_WORDS,
        "matrix": matrix_macs(one) / rate,
    }
    return clocks.get(pipe, 1.0)


_KINDS = {"LDGSTS": "start", "LDGDEPBAR": "close", "DEPBAR": "wait", "HGMMA": "start"}


def _kind(one: Instruction) -> str:
    """WARPGROUP.ARRIVE opens a group of products, and so closes the one before."""
    if one.base == "WARPGROUP":
        return "close" if "ARRIVE" in one.opcode else "wait" if "DEPBAR" in one.opcode else ""
    return _KINDS.get(one.base, "")


def _use(one: Instruction, chip: Chip, warps: int, far: int) -> _Use:
    pipe = pipe_of(one)
    count, width = results_of(one)
    writes = [name for i, word in enumerate(one.operands[:count]) for name in names_in(word, width if i == 0 else 1)]
    unit = "mad" if pipe == "fma" else pipe  # both are issued to the units that multiply
    latency = latency_of(one, pipe, chip, far)
    products = one.base in ("HGMMA", "WARPGROUP")
    return _Use(reads_of(one), tuple(writes), unit, _busy(one, pipe, chip, warps), latency, _kind(one), products)


class _Groups:
    """When the groups of copies, or of products, are through, in their order; the last one is open."""

    def __init__(self) -> None:
        self.times = [0.0]

    def done(self, pending: int) -> float:
        """When all but so many of the last are."""
        return max(self.times[: len(self.times) - pending], default=0.0)

    def start(self, until: float) -> None:
        """One more in the open group."""
        self.times[-1] = max(self.times[-1], until)

    def later(self, clocks: float) -> None:
        """As if nothing had happened for so long."""
        self.times = [at + clocks for at in self.times]


class _Warp:
    """A warp on its way."""

    def __init__(self) -> None:
        self.now = self.end = 0.0
        self.ready: dict[str, float] = {}
        self.free: dict[str, float] = {}
        self.copies, self.products = _Groups(), _Groups()

    def step(self, use: _Use, pending: int) -> None:
        """Issue one; `pending`: groups that a wait leaves on their way."""
        at = max([self.now + 1, self.free.get(use.unit, 0.0), *(self.ready.get(name, 0.0) for name in use.reads)])
        groups = self.products if use.products else self.copies
        if use.kind == "wait":
            at = max(at, groups.done(pending + (not use.products)))  # a copy that no group has is not waited for
        elif use.kind == "close":
            groups.times.append(0.0)
        elif use.kind == "start":
            groups.start(at + use.busy + use.latency)
        self.free[use.unit] = at + use.busy
        for name in use.writes:
            self.ready[name] = at + use.busy + use.latency
        self.now = at
        self.end = max(self.end, at + use.busy)
        if use.unit == "other" and use.latency > 4 and not use.writes:
            self.now = at + use.latency  # a barrier

    def later(self, clocks: float) -> None:
        """As if nothing had happened for so long."""
        self.now, self.end = self.now + clocks, self.end + clocks
        self.ready = {name: at + clocks for name, at in self.ready.items()}
        self.free = {name: at + clocks for name, at in self.free.items()}
        self.copies.later(clocks)
        self.products.later(clocks)


def _pending(one: Instruction) -> int:
    """Of DEPBAR.LE SB0, n and WARPGROUP.DEPBAR.LE gsb0, n: how many groups may be on their way."""
    return int(one.operands[-1], 0) if "DEPBAR" in one.opcode and len(one.operands) > 1 else 0


def clocks_of(nodes: Sequence[Node], chip: Chip, warps: int, far: int) -> float:
    """From a program's start to its end; `far`: the latency of global memory, in clocks."""
    warp = _Warp()
    for node in nodes:
        body = node.body if isinstance(node, Repeat) else (node,)
        rounds = node.rounds if isinstance(node, Repeat) else 1
        uses = [(_use(one, chip, warps, far), _pending(one)) for one in body]
        before = warp.now
        for _ in range(min(rounds, ROUNDS)):
            before = warp.now
            for use, pending in uses:
                warp.step(use, pending)
        if rounds > ROUNDS:
            warp.later((rounds - ROUNDS) * (warp.now - before))
    return max(warp.end, warp.now)
