"""Launches of Triton as its code runs on a chip that need not be there: by emulation, some of their programs each.

Tensors lie on the CPU. A launch is compiled for the chip, its tensors, and those whose addresses stand in a table of
64-bit words among them, are laid out in one global memory, and programs of it run there, spread evenly over the grid.
`whole`: all of them run, and the tensors get what they wrote, so that what comes later computes with it; else memory is
zeros but for small tensors, and nothing comes back.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bench.sass.chips import Chip
from bench.sass.code import Code, cache_folder, code_of
from bench.sass.emulation.block import Block
from bench.sass.emulation.clocks import SECTOR, Clocks, Phase
from bench.sass.emulation.state import GLOBAL, LANES, WINDOW, Array, State
from bench.sass.listing import instructions
from bench.sass.recording import Move, Moves, Recorded, launches_into

__all__ = ["Program", "Ran", "emulated"]

ALIGNMENT = 256  # bytes between tensors
TABLE = "table"
SAMPLED = 8  # programs of a launch
COPIED = 1 << 22  # bytes of a tensor at most that are there where not all programs run


class Program(NamedTuple):
    """What one program took: its phases, and of each tensor the bytes of the sectors that it read, and wrote."""

    phases: Sequence[Phase]
    read: Sequence[int]
    written: Sequence[int]


class Ran(NamedTuple):
    """A launch, its code, the programs of it that have run, and the bytes of its tensors."""

    launch: Recorded
    code: Code
    programs: Sequence[Program]
    held: Sequence[int]

    def moved(self) -> tuple[int, int]:
        """Bytes between multiprocessors and L2, and at most between L2 and memory: what programs share counts once."""
        near = far = 0.0
        for i, held in enumerate(self.held):
            for every in (sum(one.read[i] for one in self.programs), sum(one.written[i] for one in self.programs)):
                total = every / len(self.programs) * self.launch.programs
                near, far = near + total, far + min(total, held)
        return round(near), round(far)


class _Memory:
    """Storages of tensors one after the other; `ranges`: (where one begins on the CPU, its bytes, its first byte)."""

    def __init__(self, tensors: Sequence[Tensor], whole: bool) -> None:
        self.ranges: list[tuple[int, int, int]] = []
        self._stored = {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().nbytes()}
        size = ALIGNMENT
        for begin, tensor in self._stored.items():
            held = tensor.untyped_storage().nbytes()
            self.ranges.append((begin, held, size))
            size += (held // ALIGNMENT + 2) * ALIGNMENT
        self._bytes: Array = np.zeros(size, np.uint8)  # no memory of the machine until it is used
        self.words: Array = self._bytes.view(np.uint32)
        for begin, held, first in self.ranges:
            if whole or held <= COPIED:
                self._bytes[first : first + held] = _bytes_of(self._stored[begin])

    def address(self, at: int) -> int:
        """Of what stands there on the CPU; 0 where no tensor does."""
        return next((GLOBAL + first + at - begin for begin, held, first in self.ranges if 0 <= at - begin < held), 0)

    def counted(self, sectors: set[int]) -> list[int]:
        """Bytes of these sectors, by the tensors that they are of."""
        size = 4 * SECTOR
        at = np.sort(np.fromiter(sectors, np.int64, len(sectors))) * size
        edges = np.array([first for _, _, first in self.ranges] + [len(self._bytes)])
        return (np.diff(np.searchsorted(at, edges)) * size).tolist()

    def translate(self, table: Tensor) -> None:
        """Words of the table that are addresses become those of this memory."""
        first = (self.address(table.data_ptr()) - GLOBAL) // 8
        words = self._bytes.view(np.int64)[first : first + table.numel()]
        for i, word in enumerate(words.tolist()):
            words[i] = self.address(word) or word

    def back(self, tables: Sequence[Tensor]) -> None:
        """What was written, into the tensors; tables keep their addresses."""
        kept = {table.untyped_storage().data_ptr() for table in tables}
        for begin, held, first in self.ranges:
            if begin not in kept:
                _bytes_of(self._stored[begin])[:] = self._bytes[first : first + held]


def _bytes_of(tensor: Tensor) -> Array:
    """A storage's bytes, which may be written."""
    held = tensor.untyped_storage()
    return np.ctypeslib.as_array((ctypes.c_uint8 * held.nbytes()).from_address(held.data_ptr()))


def _named(tensor: Tensor, words: Sequence[int]) -> bool:
    """Whether one of these sorted words is an address of the tensor's memory."""
    storage = tensor.untyped_storage()
    return bisect_left(words, storage.data_ptr()) < bisect_left(words, storage.data_ptr() + storage.nbytes())


def _parameters(launch: Recorded, memory: _Memory) -> bytes:
    """The arguments one after the other, each at a multiple of its size, and no scratch memory behind them."""
    made = b""
    for name, kind in launch.signature.items():
        if kind == "constexpr":
            continue
        value, letter = launch.values[name], {"i32": "i", "i64": "q", "fp32": "f"}.get(kind, "Q")
        size = struct.calcsize(letter)
        made = made.ljust(-(-len(made) // size) * size, b"\0")
        made += struct.pack(letter, memory.address(value.data_ptr()) if isinstance(value, Tensor) else value)
    return made.ljust(-(-len(made) // 8) * 8 + 16, b"\0")


def _state(launch: Recorded, code: Code, memory: _Memory, capability: int, program: int) -> State:
    begin = 0x210 if capability >= 90 else 0x160
    bank = np.zeros(4096, np.uint32)
    bank[0], bank[3] = code.warps * LANES, launch.programs
    bank[6:8] = 0, WINDOW
    given = np.frombuffer(_parameters(launch, memory), np.uint32)
    bank[begin // 4 : begin // 4 + len(given)] = given
    reserved = 1024 if capability >= 90 else 0
    return State(code.warps, {0: bank}, memory.words, (code.shared + reserved + 1024) // 4, program)


def _tables(launch: Recorded) -> list[Tensor]:
    """Its tensor of words some of which are addresses, where it has one: a parameter of that name."""
    return [launch.values[TABLE]] if TABLE in launch.values else []


class Emulation:
    """Launches, as they come."""

    def __init__(self, chip: Chip, whole: bool, folder: Path, known: Moves, found: list[Any]) -> None:
        self._chip, self._whole, self._folder, self._known, self._found = chip, whole, folder, known, found
        self._uploaded: dict[int, Tensor] = {}

    def run(self, launch: Recorded) -> None:
        """One of them."""
        code = code_of(launch, self._chip.capability, self._folder)
        tables = _tables(launch)
        self._found += [Move("upload", table.untyped_storage().nbytes()) for table in tables if self._is_new(table)]
        words = sorted({word for table in tables for word in table.flatten().tolist()})
        beside = [tensor for tensor in self._known.every() if words and _named(tensor, words)]
        memory = _Memory([*launch.tensors.values(), *beside], self._whole)
        for table in tables:
            memory.translate(table)
        every = range(launch.programs)
        chosen = every if self._whole else sorted({i * len(every) // SAMPLED for i in range(SAMPLED)} & set(every))
        programs = [self._program(launch, code, memory, program) for program in chosen]
        if self._whole:
            memory.back(tables)
        self._found.append(Ran(launch, code, programs, [held for _, held, _ in memory.ranges]))

    def _is_new(self, table: Tensor) -> bool:
        """Whether the table's storage has not been met, which one copy has brought."""
        at = table.untyped_storage().data_ptr()
        new = at not in self._uploaded
        self._uploaded[at] = table  # kept, so that no other gets its address
        return new

    def _program(self, launch: Recorded, code: Code, memory: _Memory, program: int) -> Program:
        listing = instructions(code.sass)
        state = _state(launch, code, memory, self._chip.capability, program)
        clocks, block = Clocks(listing, state, self._chip), Block(listing, state)
        passed = 0

        def observe(at: int, lanes: Array) -> None:
            nonlocal passed
            if block.passed != passed:
                passed = block.passed
                clocks.barrier()
            clocks(at, lanes)

        block.run(observe)
        clocks.barrier()
        return Program(clocks.phases, memory.counted(clocks.read), memory.counted(clocks.written))


@contextlib.contextmanager
def emulated(
    chip: Chip, tensors: Sequence[Tensor], whole: bool = False, folder: Path | None = None
) -> Iterator[list[Ran | Move]]:
    """Launches within it run so, and PyTorch's kernels as they do on the CPU; all are listed in their order.

    tensors: those that are there before and that tables name.
    """
    found: list[Ran | Move] = []
    moves = Moves(found, tensors)
    emulation = Emulation(chip, whole, folder or cache_folder(), moves, found)
    with launches_into(emulation.run), moves:
        yield found
