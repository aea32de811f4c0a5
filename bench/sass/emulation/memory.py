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
    if "BFLY" not in one.opcode:
        raise ValueError(one.opcode)
    target, source, by = register(one.operands[1]), register(one.operands[2]), as_int(one.operands[3])

    def run(state: State) -> None:
        if not (state.mask.all(1) | ~state.mask.any(1)).all():
            raise ValueError("a shuffle of some lanes")
        lanes = np.arange(LANES) ^ np.broadcast_to(by(state), state.mask.shape)
        state.write(target, np.take_along_axis(state.registers[source], lanes.astype(np.int64), 1))

    return run
