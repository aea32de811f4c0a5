"""A block at work: its threads, instruction by instruction, until all have ended.

Of the threads that can go on, those that are furthest behind do, whatever warp they are of; a warp whose lanes have
parted issues an instruction for each part. Lanes wait for each other where the compiler says so (BSSY, BSYNC, BREAK).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bench.sass.emulation import integers, logic, matrices, memory, reals, sources  # noqa: F401  register themselves
from bench.sass.emulation.operands import predicate, register
from bench.sass.emulation.state import Array, State
from bench.sass.emulation.table import MAKERS, Made
from bench.sass.listing import Instruction

__all__ = ["Block", "Observer"]

_IGNORED = frozenset(
    {
        *("NOP", "YIELD", "WARPSYNC", "LDGDEPBAR", "DEPBAR", "ENDCOLLECTIVE"),
        *("MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "ACQBULK", "PREEXIT"),  # programs run one after the other
    }
)
INSTRUCTION_BYTES = 16
_BLOCK_BARRIER, _WARP_BARRIER = 100, 99
Observer = Callable[[int, Array], None]
"""(which instruction, [warps, 32] lanes that issue it): before it has run."""


class _Flow(NamedTuple):
    """What an instruction that may lead elsewhere is: its kind, number of a barrier, target."""

    kind: str
    number: int = 0
    target: int = -1


class Block:
    """A kernel's instructions, ready to run on a state. `passed`: barriers of the whole block."""

    def __init__(self, listing: Sequence[Instruction], state: State) -> None:
        self.listing, self.state = listing, state
        self._index = {one.address: i for i, one in enumerate(listing)}
        self._made: dict[int, Made] = {}
        shape = state.mask.shape
        self._at = np.zeros(shape, np.int64)
        self._parked = np.zeros(shape, np.int8)  # 0: at work
        self._done = np.zeros(shape, bool)
        self._barriers = np.zeros((16, *shape), bool)
        self.passed = 0

    def run(self, observe: Observer) -> None:
        """To the end. Raises ValueError for instructions that are not known."""
        with np.errstate(all="ignore"):
            while not self._done.all():
                self._turn(observe)

    def _turn(self, observe: Observer) -> None:
        """The threads that are furthest behind, until their ways part or they reach others."""
        free = ~self._done & (self._parked == 0)
        if not free.any():
            raise ValueError("all threads wait")
        at = int(self._at[free].min())
        lanes = free & (self._at == at)
        others = self._at[free & ~lanes]
        limit = int(others.min()) if others.size else len(self.listing)
        while True:
            one = self.listing[at]
            flow = self._flow(one)
            mask = lanes
            if one.guard:
                mask = lanes & predicate(one.guard.lstrip("@"))(self.state)
            observe(at, lanes)
            if flow is not None:
                self._at[lanes] = at + 1
                self._go(flow, one, at, mask)
                return
            self.state.mask = mask
            if one.base not in _IGNORED and mask.any():
                self._do(at, one)
            at += 1
            if at >= limit:
                self._at[lanes] = at
                return

    def _do(self, at: int, one: Instruction) -> None:
        made = self._made.get(at)
        try:
            if made is None:
                made = self._made[at] = MAKERS[one.base](one)
            made(self.state)
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{one.address:#x} {one.opcode} {', '.join(one.operands)}: {error!r}") from error

    def _flow(self, one: Instruction) -> _Flow | None:
        if one.base in ("BSSY", "BSYNC", "BREAK"):
            return _Flow(one.base, int(one.operands[0].removeprefix("B")))
        if one.base in ("EXIT", "BAR", "BRX", "RET") or one.opcode == "BRA.DIV":
            return _Flow(one.opcode if one.opcode == "BRA.DIV" else one.base)
        if one.base in ("BRA", "CALL"):
            return _Flow("CALL") if one.target is None else _Flow("BRA", target=self._index[one.target])
        return None

    def _go(self, flow: _Flow, one: Instruction, at: int, mask: Array) -> None:
        if flow.kind == "BRA":
            if one.opcode == "BRA.CONV" and not (mask.all(1) | ~mask.any(1)).all():  # taken by warps that are whole
                raise ValueError(f"{one.address:#x} {one.opcode}: lanes that have parted")
            if one.opcode != "BRA.CONV" and one.base == "BRA" and len(one.operands) > 1:  # and a predicate
                mask = mask & predicate(one.operands[0])(self.state)
            self._at[mask] = flow.target
        elif flow.kind == "BRX":
            targets = self._targets(one)
            for address in np.unique(targets[mask]):
                self._at[mask & (targets == address)] = self._index[int(address)]
        elif flow.kind == "EXIT":
            self._done |= mask
            self._barriers &= ~mask
        elif flow.kind == "BSSY":
            warps = mask.any(1)
            self._barriers[flow.number][warps] = mask[warps]
        elif flow.kind == "BREAK":
            self._barriers[flow.number] &= ~mask
            self._release(flow.number)
        elif flow.kind == "BSYNC":
            self._parked[mask] = flow.number + 1
            self._release(flow.number)
        elif flow.kind == "BRA.DIV":
            self._parked[mask] = _WARP_BARRIER
            whole = ((self._parked == _WARP_BARRIER) | self._done).all(1)
            self._parked[whole] = 0
        elif flow.kind == "BAR":
            self._parked[mask] = _BLOCK_BARRIER
            if ((self._parked == _BLOCK_BARRIER) | self._done).all():
                self._parked[:] = 0
                self.passed += 1
        elif mask.any():
            raise ValueError(f"{one.address:#x} {one.opcode}: a way that only rare numbers take")

    def _targets(self, one: Instruction) -> Array:
        """Addresses in a kernel: `BRX R2 -0x40` goes on from the next instruction by the register and the number."""
        text, by, *_ = one.operands[0].split()
        after = one.address + INSTRUCTION_BYTES + int(by, 16)
        return self.state.registers[register(text)].view(np.int32).astype(np.int64) + after

    def _release(self, number: int) -> None:
        """Lanes whose barrier has no one left to wait for."""
        waiting = self._parked == number + 1
        missing = (self._barriers[number] & ~waiting).any(1)
        free = waiting & ~missing[:, None]
        self._parked[free] = 0
