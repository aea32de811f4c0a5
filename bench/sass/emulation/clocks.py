"""Clocks of a block, barrier by barrier, from the instructions that its warps issue.

    chain  of the slowest warp: one instruction a clock, each when what it reads is there
    issue  of the busiest scheduler: warps are spread over four
    units  of the busiest unit of the multiprocessor: multiply-adds, integers, shared memory with its conflicts ...

A phase takes the longest of the three where a block is alone. Conflicts are those of the addresses at hand. Global
memory comes from L2 the first time that the block loads a line of 128 bytes, then from L1, as fast as shared memory;
that L1 holds all of it is assumed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bench.sass.chain import latency_of, names_in, reads_of, results_of
from bench.sass.chips import ALU_LANES, SCHEDULERS, SPECIAL_LANES, Chip
from bench.sass.counting import matrix_macs, pipe_of, words_of
from bench.sass.emulation.memory import where
from bench.sass.emulation.operands import predicate
from bench.sass.emulation.state import LANES, Array, State
from bench.sass.listing import Instruction

__all__ = ["SECTOR", "Clocks", "Phase"]

_DOUBLE = ("DADD", "DMUL", "DFMA", "F2F")
_MEMORY = ("LD", "LDS", "LDG", "ST", "STS", "STG")
_MATRICES = ("LDSM", "STSM")
SECTOR = 8  # words of 32 bits, of which global memory moves all or none


class _Form(NamedTuple):
    """What of an instruction its timing needs: registers read and written, unit."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    unit: str
    latency: float
    memory: bool
    words: int


class Phase(NamedTuple):
    """From one barrier to the next: clocks, and what was issued by all warps."""

    chain: float
    issue: float
    units: dict[str, float]
    issued: int
    fma: int  # of lanes at work
    issued_fma: int

    @property
    def clocks(self) -> float:
        """Of a block that is alone."""
        return max(self.chain, self.issue, *self.units.values())

    @property
    def bound(self) -> str:
        """What takes the longest."""
        every = {"latency": self.chain, "issue": self.issue, **self.units}
        return max(every, key=lambda name: every[name])


class Clocks:
    """Observes a block. `lines`: how often warps issue each instruction; `stalls`: their clocks until they do."""

    def __init__(self, listing: Sequence[Instruction], state: State, chip: Chip) -> None:
        self._listing, self._state, self._chip = listing, state, chip
        self._forms: dict[int, _Form] = {}
        self._ready = np.zeros((_COUNT, state.warps))
        self._clock = np.zeros(state.warps)
        self._conflicts: dict[bytes, int] = {}
        self._lines_held: set[int] = set()
        self.read: set[int] = set()  # sectors of global memory
        self.written: set[int] = set()
        self.copied = 0  # words of global memory that went to shared memory past registers, not among `read`
        self.lines: Counter[int] = Counter()
        self.stalls: defaultdict[int, float] = defaultdict(float)
        self.phases: list[Phase] = []
        self._start_phase()

    def _start_phase(self) -> None:
        self._clock[:] = 0
        self._ready[:] = 0
        self._issued = np.zeros(self._state.warps, np.int64)
        self._units: Counter[str] = Counter()
        self._fma = self._issued_fma = 0

    def __call__(self, at: int, lanes: Array) -> None:
        """An instruction that these lanes issue."""
        one, warps = self._listing[at], lanes.any(1)
        form = self._forms.get(at) or self._forms.setdefault(at, _form(one, self._chip))
        many = int(warps.sum())
        self.lines[at] += many
        self._issued += warps
        self._units[form.unit] += many * (matrix_macs(one) if form.unit == "matrix" else 1)
        before = self._clock[warps]
        start = before
        for name in form.reads:
            start = np.maximum(start, self._ready[name][warps])
        wait: Array | float = form.latency
        if form.memory:
            wait = self._moved(one, form, lanes)[warps]
        elif one.base in _MATRICES:  # whole rows, without conflicts
            self._units["wavefronts"] += form.words * many
        elif one.base == "LDGSTS":
            self.copied += form.words * int(self._guarded(one, lanes).sum())
        for name in form.writes:
            self._ready[name][warps] = start + wait
        self._clock[warps] = start + (wait if one.base == "MEMBAR" else 1)
        self.stalls[at] += float((start + 1 - before).sum())
        if one.base == "FFMA":
            self._fma += int(lanes.sum())
            self._issued_fma += many

    def barrier(self) -> None:
        """The end of a phase."""
        issue = max(int(self._issued[i::SCHEDULERS].sum()) for i in range(SCHEDULERS))
        busy = {name: clocks for name, clocks in self._unit_clocks().items() if clocks}
        chain = float(self._clock.max()) + self._chip.latencies.barrier
        self.phases.append(Phase(chain, issue, busy, int(self._issued.sum()), self._fma, self._issued_fma))
        self._start_phase()

    def _unit_clocks(self) -> dict[str, float]:
        units, chip = self._units, self._chip
        device = chip.device
        doubles = max(2.0, device.fp64 / (2 * device.processors * device.hertz))
        return {
            "fma": units["fma"] * LANES / chip.fma_lanes + units["mad"] * LANES / ALU_LANES,
            "integers": units["alu"] * LANES / ALU_LANES,
            "special": units["special"] * LANES / SPECIAL_LANES,
            "double": units["double"] * LANES / doubles,
            "shared memory": units["wavefronts"],
            "matrix": units["matrix"] / (chip.matrix_macs * chip.synchronous),
        }

    def _guarded(self, one: Instruction, lanes: Array) -> Array:
        """Those of which the instruction's predicate holds."""
        return lanes & predicate(one.guard.lstrip("@"))(self._state) if one.guard else lanes

    def _moved(self, one: Instruction, form: _Form, lanes: Array) -> Array:
        """Clocks until what each warp loads is there; counts wavefronts."""
        lanes = self._guarded(one, lanes)
        self._state.mask = lanes
        shared, at = where(one, self._state)
        found = np.zeros(len(lanes))
        for warp in np.flatnonzero(lanes.any(1)):
            own = lanes[warp]
            if shared[warp][own].all():
                waves = self._wavefronts(at[warp][own], form.words)
                found[warp] = self._chip.latencies.shared + waves - 1
            else:
                waves, found[warp] = form.words, self._global(at[warp][own & ~shared[warp]], one.base)
            self._units["wavefronts"] += waves
        return found

    def _global(self, at: Array, how: str) -> float:
        """Clocks of a warp's access to global memory; an access of several words is to one sector."""
        touched = self.written if how in ("ST", "STG") else self.read
        touched.update((at // SECTOR).tolist())
        lines = set((at // LANES).tolist())
        cold = lines - self._lines_held
        self._lines_held |= cold
        return self._chip.latencies.l2 if cold else self._chip.latencies.shared

    def _wavefronts(self, at: Array, words: int) -> int:
        """Of a warp's access to shared memory: rounds until every bank has given all that is asked of it."""
        key = (at - at.min() + at.min() % LANES).tobytes() + bytes([words])
        if key not in self._conflicts:
            self._conflicts[key] = sum(
                _rounds(at[i : i + LANES // words], words) for i in range(0, len(at), LANES // words)
            )
        return self._conflicts[key]


def _rounds(at: Array, words: int) -> int:
    every = np.unique(at[:, None] + np.arange(words))
    return int(np.bincount(every % LANES).max())


_REGISTERS, _UNIFORM, _PREDICATES = 256, 64, 8
_COUNT = _REGISTERS + _UNIFORM + 2 * _PREDICATES
_FIRST = {"R": 0, "UR": _REGISTERS, "P": _REGISTERS + _UNIFORM, "UP": _REGISTERS + _UNIFORM + _PREDICATES}


def _places(words: Iterable[str], width: int = 1) -> tuple[int, ...]:
    """Where the table of what is ready has the registers of operands; the first of them has `width`."""
    return tuple(_place(name) for i, word in enumerate(words) for name in names_in(word, width if i == 0 else 1))


def _place(name: str) -> int:
    kind = name.rstrip("0123456789")
    return _FIRST[kind] + int(name.removeprefix(kind))


def _form(one: Instruction, chip: Chip) -> _Form:
    """Global memory's latency is found with its address."""
    count, width = results_of(one)
    unit = "double" if one.base in _DOUBLE else pipe_of(one)
    latency = chip.latencies.special if unit == "double" else latency_of(one, unit, chip, chip.latencies.l2)
    reads = tuple(_place(name) for name in reads_of(one))
    return _Form(reads, _places(one.operands[:count], width), unit, latency, one.base in _MEMORY, words_of(one))
