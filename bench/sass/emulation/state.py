"""What the threads of a block have: registers, predicates, and memory.

Arrays are [warps, 32] a register, [warps, 1] a uniform one. Addresses of global memory begin at `GLOBAL`; a generic
address of shared memory has `WINDOW` as its upper word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GLOBAL", "LANES", "RZ", "WINDOW", "Array", "State"]

Array = NDArray[Any]
LANES = 32
RZ = 255
GLOBAL = 1 << 36
WINDOW = 0x7F00
LOCAL_WORDS = 1024  # of a thread's own memory, for spills


class State:
    """Of one block. `constants`: banks of 32-bit words; `words`: global memory."""

    def __init__(
        self, warps: int, constants: Mapping[int, Array], words: Array, shared_words: int, block: int = 0
    ) -> None:
        shape = (warps, LANES)
        self.warps, self.block = warps, block
        self.constants = constants
        self.registers = np.zeros((RZ + 1, *shape), np.uint32)
        self.floats = self.registers.view(np.float32)
        self.uniform = np.zeros((64, warps, 1), np.uint32)
        self.predicates = np.zeros((8, *shape), bool)
        self.predicates[7] = True
        self.uniform_predicates = np.zeros((8, warps, 1), bool)
        self.uniform_predicates[7] = True
        self.words = words
        self.shared = np.full(shared_words, 0x7FC00000, np.uint32)  # NaN
        self.local = np.full((LOCAL_WORDS, *shape), 0x7FC00000, np.uint32)
        self.mask = np.ones(shape, bool)  # of the instruction at hand

    def write(self, register: int, value: Any) -> None:
        """A register of the threads at work."""
        if register != RZ:
            np.copyto(self.registers[register], value, where=self.mask, casting="unsafe")

    def write_float(self, register: int, value: Any) -> None:
        """The same, of a float32."""
        if register != RZ:
            np.copyto(self.floats[register], value, where=self.mask, casting="unsafe")

    def write_wide(self, register: int, value: Array) -> None:
        """Two registers, of 64 bits."""
        bits = value.view(np.uint64) if value.dtype != np.uint64 else value
        self.write(register, bits & np.uint64(0xFFFFFFFF))
        self.write(register + 1 if register != RZ else RZ, bits >> np.uint64(32))

    def wide(self, register: int) -> Array:
        """Two registers as 64 bits."""
        if register == RZ:
            return np.zeros(self.mask.shape, np.uint64)
        low, high = self.registers[register], self.registers[register + 1]
        return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))

    def write_predicate(self, predicate: int, value: Any) -> None:
        """A predicate of the threads at work; the seventh is always true."""
        if predicate != 7:
            np.copyto(self.predicates[predicate], value, where=self.mask)

    def place(self, address: Array) -> tuple[Array, Array]:
        """(whether it is shared memory, word) of generic addresses. Raises ValueError for what is nowhere."""
        shared = (address >> np.uint64(32)) == WINDOW
        at = np.where(shared, address & np.uint64(0xFFFFFFFF), address - np.uint64(GLOBAL)) >> np.uint64(2)
        at = np.where(self.mask, at, 0)
        limit = np.where(shared, len(self.shared), len(self.words))
        if (at >= limit)[self.mask].any():
            raise ValueError(f"an address outside of memory: {address[self.mask].tolist()[:4]}")
        return shared, at.astype(np.int64)
