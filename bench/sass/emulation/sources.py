"""What gives a register its first value: moves, constants, what a thread is, products once a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_int, constant, register, result
from bench.sass.emulation.state import LANES, WINDOW, State
from bench.sass.emulation.table import Made, makes
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
    """a b + c once a warp; of a wide one c has 32 bits here, which is 0."""
    target, wide = register(one.operands[0]), "WIDE" in one.opcode
    a, b, c = map(as_int, one.operands[1:4])
    if wide and one.operands[3] != "URZ":
        raise ValueError(f"{one.opcode} + {one.operands[3]}: not known here")

    def run(state: State) -> None:
        total = _long(a(state)) * _long(b(state)) + _long(c(state))
        state.uniform[target] = total & _LOW
        if wide:
            state.uniform[target + 1] = total >> _32

    return run
