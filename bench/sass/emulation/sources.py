"""What gives a register its first value: moves, constants, what a thread is, products once a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_int, constant, register, result
from bench.sass.emulation.state import LANES, WINDOW, State
from bench.sass.emulation.table import Made, makes, number_of
from bench.sass.listing import Instruction

__all__: list[str] = []

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def _long(value: Any) -> Any:
    return np.asarray(value).astype(np.uint64)


@makes("MOV", "UMOV", "R2UR")
def _mov(one: Instruction) -> Made:
    write, read = result(one.operands[0]), as_int(one.operands[1])
    return lambda state: write(state, read(state))


@makes("LDC", "ULDC")
def _ldc(one: Instruction) -> Made:
    bank, added, at = constant(one.operands[1])
    words, target, uniform = 2 if "64" in one.opcode else 1, register(one.operands[0]), one.base == "ULDC"
    by = as_int(added) if added else None

    def run(state: State) -> None:
        place = np.broadcast_to(np.uint32(at) if by is None else by(state) + np.uint32(at), state.mask.shape)
        place = np.where(state.mask, place, 0) // 4
        for word in range(words):
            found = state.constants[bank][place + word]
            if uniform:
                state.uniform[target + word] = found[:, :1]
            else:
                state.write(target + word, found)

    return run


@makes("S2R", "S2UR", "CS2R")
def _special(one: Instruction) -> Made:
    target, name = register(one.operands[0]), one.operands[1]
    if name == "SR_TID.X":
        return lambda state: state.write(target, np.arange(state.warps * LANES).reshape(-1, LANES))
    known = {"SR_CgaCtaId": 0, "SRZ": 0, "SR_SWINHI": WINDOW}

    def run(state: State) -> None:
        value = np.uint32(state.block if name == "SR_CTAID.X" else known[name])
        if one.base == "S2UR":
            state.uniform[target] = value
            return
        state.write(target, value)
        if one.base == "CS2R" and ".32" not in one.opcode:
            state.write(target + 1, value)

    return run


@makes("UIMAD")
def _uniform(one: Instruction) -> Made:
    """a b + c once a warp; of a wide one c has 64 bits."""
    target, how = register(one.operands[0]), one.opcode.split(".")[1:]
    a, b, c = map(as_int, one.operands[1:4])
    if "WIDE" not in how:

        def narrow(state: State) -> None:
            state.uniform[target] = a(state) * b(state) + c(state)

        return narrow
    added, number = number_of(one.operands[3])

    def wide(state: State) -> None:
        factors = (np.asarray(read(state)) for read in (a, b))
        x, y = (f.astype(np.uint64) if "U32" in how else f.view(np.int32).astype(np.int64) for f in factors)
        total = np.broadcast_to(np.asarray(x * y).view(np.uint64) + added(state, number), (state.warps, 1))
        state.uniform[target], state.uniform[target + 1] = total & _LOW, total >> _32

    return wide
