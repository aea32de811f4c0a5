"""Bits, shifts, comparisons and choices."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_int, flag, predicate, register, result
from bench.sass.emulation.state import State
from bench.sass.emulation.table import COMPARE, Made, makes
from bench.sass.listing import Instruction

__all__: list[str] = []

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def _long(value: Any) -> Any:
    return np.asarray(value).astype(np.uint64)


def _signed(value: Any) -> Any:
    return np.asarray(value).view(np.int32)


@makes("SHF", "USHF")
def _shift(one: Instruction) -> Made:
    how, write = one.opcode.split(".")[1:], result(one.operands[0])
    low, by, high = map(as_int, one.operands[1:4])
    left, upper = how[0] == "L", "HI" in how
    long = "U64" in how or "S64" in how
    width = np.uint64(64 if long else 32)
    signed = how[1].startswith("S")
    if left and not long and not upper:  # the operand in front
        return lambda state: write(state, _capped_left(_long(low(state)), _long(by(state)), width) & _LOW)

    def run(state: State) -> None:
        pair = (_long(high(state)) << _32) | _long(low(state))
        shift = np.minimum(_long(by(state)), width)
        if left:
            write(state, _capped_left(pair, shift, np.uint64(64)) >> _32)
        elif upper and signed:
            write(state, (_signed(high(state)).astype(np.int64) >> shift.astype(np.int64)).view(np.uint64) & _LOW)
        elif upper:
            write(state, _long(high(state)) >> shift)
        else:
            write(state, np.where(shift < 64, pair >> np.minimum(shift, np.uint64(63)), np.uint64(0)) & _LOW)

    return run


def _capped_left(value: Any, by: Any, width: Any) -> Any:
    return np.where(by < width, value << np.minimum(by, np.uint64(63)), np.uint64(0))


@makes("LOP3", "ULOP3")
def _lop3(one: Instruction) -> Made:
    texts, out = list(one.operands), 7
    if texts[0][0] == "P":
        out = int(texts.pop(0)[1].replace("T", "7"))
    write, (a, b, c), table = result(texts[0]), map(as_int, texts[1:4]), int(texts[4], 16)

    def run(state: State) -> None:
        x, y, z = a(state), b(state), c(state)
        found: Any = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                found = found | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
        state.write_predicate(out, np.asarray(found) != 0)
        write(state, found)

    return run


@makes("PLOP3", "UPLOP3")
def _plop3(one: Instruction) -> Made:
    write, table = flag(one.operands[0]), int(one.operands[5], 16)
    if one.operands[1] not in ("PT", "UPT"):
        raise ValueError("two results")
    a, b, c = map(predicate, one.operands[2:5])

    def run(state: State) -> None:
        row = 4 * a(state).astype(np.int64) + 2 * b(state) + c(state)
        write(state, (table >> row & 1).astype(bool))

    return run


@makes("ISETP", "UISETP")
def _isetp(one: Instruction) -> Made:
    how = one.opcode.split(".")[1:]
    unsigned, extended, joined = "U32" in how, "EX" in how, "OR" in how
    if "XOR" in how or one.operands[1] not in ("PT", "UPT"):
        raise ValueError("two results, or xor")
    write, a, b = flag(one.operands[0]), as_int(one.operands[2]), as_int(one.operands[3])
    before, low = predicate(one.operands[4]), predicate(one.operands[5]) if extended else None
    compare = COMPARE[how[0]]

    def run(state: State) -> None:
        x, y = a(state), b(state)
        if not unsigned:
            x, y = _signed(x), _signed(y)
        found = compare(x, y)
        if low is not None:
            strict = found & (x != y) if how[0] != "NE" else found
            found = strict | ((x == y) & low(state))
        last = before(state)
        write(state, found | last if joined else found & last)

    return run


@makes("SEL", "USEL")
def _sel(one: Instruction) -> Made:
    write, a, b = result(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    which = predicate(one.operands[3])
    return lambda state: write(state, np.where(which(state), a(state), b(state)))


@makes("PRMT")
def _prmt(one: Instruction) -> Made:
    """Bytes of (b a) by the selector's digits; a digit's upper bit spreads the byte's sign."""
    target, a, how, b = register(one.operands[0]), as_int(one.operands[1]), one.operands[2], as_int(one.operands[3])
    digits = [int(how, 16) >> 4 * i & 15 for i in range(4)]

    def run(state: State) -> None:
        pair = (_long(b(state)) << _32) | _long(a(state))
        result: Any = np.uint64(0)
        for i, digit in enumerate(digits):
            byte = pair >> np.uint64(8 * (digit & 7)) & np.uint64(255)
            byte = (byte >> np.uint64(7)) * np.uint64(255) if digit & 8 else byte
            result = result | byte << np.uint64(8 * i)
        state.write(target, result)

    return run


@makes("VOTEU")
def _vote(one: Instruction) -> Made:
    """Whether a predicate holds in all lanes of a warp that are at work, or in any."""
    how, number, read = one.opcode.split(".")[1], int(one.operands[0].removeprefix("UP")), predicate(one.operands[1])
    if how not in ("ALL", "ANY") or len(one.operands) > 2:
        raise ValueError(f"{one.opcode}: not known here")

    def run(state: State) -> None:
        holds = np.broadcast_to(read(state), state.mask.shape)
        found = (holds | ~state.mask).all(1) if how == "ALL" else (holds & state.mask).any(1)
        state.write_uniform_predicate(number, np.asarray(found)[:, None])

    return run


@makes("P2R")
def _p2r(one: Instruction) -> Made:
    target, mask = register(one.operands[0]), int(one.operands[3], 16)

    def run(state: State) -> None:
        bits = sum(state.predicates[i].astype(np.uint32) << np.uint32(i) for i in range(7))
        state.write(target, np.asarray(bits) & np.uint32(mask))

    return run


@makes("R2P")
def _r2p(one: Instruction) -> Made:
    """Bits into the predicates that the mask names."""
    if one.operands[0] != "PR":
        raise ValueError(f"{one.operands[0]}: not known here")
    bits, mask = as_int(one.operands[1]), int(one.operands[2], 16)

    def run(state: State) -> None:
        value = bits(state)
        for i in range(7):
            if mask >> i & 1:
                state.write_predicate(i, (value >> np.uint32(i) & np.uint32(1)).astype(bool))

    return run
