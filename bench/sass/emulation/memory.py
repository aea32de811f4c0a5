"""Loads, stores, copies to shared memory, and shuffles."""

from __future__ import annotations

import numpy as np

from bench.sass.counting import words_of
from bench.sass.emulation.operands import address as address_of
from bench.sass.emulation.operands import as_int, register
from bench.sass.emulation.state import GLOBAL, LANES, WINDOW, Array, State
from bench.sass.emulation.table import Made, makes
from bench.sass.listing import Instruction

__all__ = ["SHARED", "where"]

SHARED = ("LDS", "STS")


def where(one: Instruction, state: State) -> tuple[Array, Array]:
    """(whether it is shared memory, word) of what an instruction loads or stores."""
    return state.place(_generic(one, next(t for t in one.operands if "[" in t), state))


def _generic(one: Instruction, text: str, state: State) -> Array:
    at: Array = np.broadcast_to(address_of(text).of(state), state.mask.shape)
    return (at & np.uint64(0xFFFFFFFF)) | np.uint64(WINDOW << 32) if one.base in SHARED else at


def _known(one: Instruction) -> None:
    if any(f".{size}" in one.opcode for size in ("U8", "U16", "S8", "S16")):
        raise ValueError(f"{one.opcode}: not known here")


def _byte(one: Instruction) -> Made:
    """A byte of shared memory, zeros before it."""
    target, read = register(one.operands[0]), address_of(one.operands[1])

    def run(state: State) -> None:
        _, at = where(one, state)
        shift = (read.of(state) & np.uint64(3)).astype(np.uint32) * np.uint32(8)
        state.write(target, state.shared[at] >> shift & np.uint32(255))

    return run


@makes("LDS", "LD", "LDG")
def _load(one: Instruction) -> Made:
    if one.opcode == "LDS.U8":
        return _byte(one)
    _known(one)
    target, words = register(one.operands[0]), words_of(one)

    def run(state: State) -> None:
        shared, at = where(one, state)
        for word in range(words):
            near = state.shared[np.where(shared, at + word, 0)]
            value = near if one.base in SHARED else np.where(shared, near, state.words[np.where(shared, 0, at + word)])
            state.write(target + word, value)

    return run


@makes("STS", "ST", "STG")
def _store(one: Instruction) -> Made:
    _known(one)
    source, words = register(one.operands[1]), words_of(one)

    def run(state: State) -> None:
        shared, at = where(one, state)
        near, far = shared & state.mask, ~shared & state.mask
        for word in range(words):
            value = state.registers[source + word if source != 255 else 255]
            state.shared[at[near] + word] = value[near]
            state.words[at[far] + word] = value[far]

    return run


@makes("ATOMG")
def _atomic(one: Instruction) -> Made:
    """Of one lane: a sum, or the smaller of two numbers of 64 bits with signs."""
    how = one.opcode.split(".")[2:4]
    if how not in (["ADD", "64"], ["MIN", "S64"]):
        raise ValueError(f"{one.opcode}: not known here")
    target, source = register(one.operands[1]), register(one.operands[3])

    def run(state: State) -> None:
        if state.mask.sum() != 1:
            raise ValueError("an atomic operation of several lanes")
        _, at = where(one, state)
        words = state.words[at[state.mask][0] :][:2].view(np.int64)
        before, value = int(words[0]), int(state.wide(source).view(np.int64)[state.mask][0])
        words[0] = before + value if how[0] == "ADD" else min(before, value)
        state.write_wide(target, np.full(state.mask.shape, before, np.int64))

    return run


@makes("LDL", "STL")
def _local(one: Instruction) -> Made:
    """A thread's own memory, where registers are spilled to."""
    load, words = one.base == "LDL", words_of(one)
    memory, own = one.operands[::-1] if load else one.operands
    read, first = address_of(memory), register(own)

    def run(state: State) -> None:
        at = ((read.of(state) & np.uint64(0xFFFFFFFF)) >> np.uint64(2)).astype(np.int64)
        for word in range(words):
            place = at + word
            if load:
                state.write(first + word, np.take_along_axis(state.local, place[None] % len(state.local), 0)[0])
                continue
            warps, lanes = np.nonzero(state.mask)
            state.local[place[state.mask] % len(state.local), warps, lanes] = state.registers[first + word][state.mask]

    return run


@makes("LDGSTS")
def _copy(one: Instruction) -> Made:
    """From global memory, some words a thread; they are there at once."""
    words = words_of(one)
    to, source = address_of(one.operands[0]), address_of(one.operands[1])

    def run(state: State) -> None:
        at = (to.of(state) >> np.uint64(2)).astype(np.int64)
        read = ((source.of(state) - np.uint64(GLOBAL)) >> np.uint64(2)).astype(np.int64)
        for word in range(words):
            state.shared[at[state.mask] + word] = state.words[read[state.mask] + word]

    return run


@makes("SHFL")
def _shuffle(one: Instruction) -> Made:
    how = one.opcode.split(".")[1]
    if how not in ("BFLY", "IDX") or one.operands[4] != "0x1f":
        raise ValueError(f"{one.opcode} {one.operands[4]}: not known here")
    target, source, by = register(one.operands[1]), register(one.operands[2]), as_int(one.operands[3])

    def run(state: State) -> None:
        if not (state.mask.all(1) | ~state.mask.any(1)).all():
            raise ValueError("a shuffle of some lanes")
        number = np.broadcast_to(by(state), state.mask.shape)
        lanes = (number if how == "IDX" else np.arange(LANES) ^ number) % LANES
        state.write(target, np.take_along_axis(state.registers[source], lanes.astype(np.int64), 1))

    return run


@makes("LDSM", "STSM")
def _matrices(one: Instruction) -> Made:
    """8 rows of 16 bytes a matrix, each lane a word of a row; lane 8 m + r has the address of row r of matrix m."""
    if one.opcode.split(".")[1:3] != ["16", "M88"]:
        raise ValueError(f"{one.opcode}: not known here")
    load, count = one.base == "LDSM", words_of(one)
    memory, own = one.operands if not load else one.operands[::-1]
    read, first, lanes = address_of(memory), register(own), np.arange(LANES)

    def run(state: State) -> None:
        if not (state.mask.all(1) | ~state.mask.any(1)).all():
            raise ValueError("matrices of some lanes")
        at = (np.broadcast_to(read.of(state), state.mask.shape) >> np.uint64(2)).astype(np.int64)
        for matrix in range(count):
            places = at[:, 8 * matrix + lanes // 4] + lanes % 4
            if load:
                state.write(first + matrix, state.shared[np.where(state.mask, places, 0)])
            else:
                state.shared[places[state.mask]] = state.registers[first + matrix][state.mask]

    return run
