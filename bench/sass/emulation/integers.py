"""Integer and logic instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_int, constant, predicate, register, result
from bench.sass.emulation.state import LANES, WINDOW, State
from bench.sass.emulation.table import COMPARE, Made, makes, number_of
from bench.sass.listing import Instruction

__all__: list[str] = []

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def _long(value: Any) -> Any:
    return np.asarray(value).astype(np.uint64)


def _signed(value: Any) -> Any:
    return np.asarray(value).view(np.int32)


@makes("MOV", "UMOV", "R2UR")
def _mov(one: Instruction) -> Made:
    write, read = result(one.operands[0]), as_int(one.operands[1])
    return lambda state: write(state, read(state))


@makes("IMAD")
def _imad(one: Instruction) -> Made:
    how, target = one.opcode.split(".")[1:], register(one.operands[0])
    if "WIDE" in how:
        return _wide(one, "U32" in how)
    a, b, c = map(as_int, one.operands[1:4])
    if "HI" in how:
        return _upper(one)
    if "X" in how:
        carry = predicate(one.operands[4])
        return lambda state: state.write(target, a(state) * b(state) + c(state) + carry(state).astype(np.uint32))
    return lambda state: state.write(target, a(state) * b(state) + c(state))


def _upper(one: Instruction) -> Made:
    """The upper word of a b + c, of which c has 64 bits."""
    if "U32" not in one.opcode:
        raise ValueError(f"{one.opcode}: not known here")
    target, a, b = register(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    added, number = number_of(one.operands[3])
    return lambda state: state.write(target, (_long(a(state)) * _long(b(state)) + added(state, number)) >> _32)


def _wide(one: Instruction, unsigned: bool) -> Made:
    if len(one.operands) != 4:
        raise ValueError("a carry")
    target, a, b = register(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    added, number = number_of(one.operands[3])

    def run(state: State) -> None:
        if unsigned:
            product = _long(a(state)) * _long(b(state))
        else:
            product = (_signed(a(state)).astype(np.int64) * _signed(b(state)).astype(np.int64)).view(np.uint64)
        state.write_wide(target, np.broadcast_to(product + added(state, number), state.mask.shape).copy())

    return run


@makes("IADD3", "VIADD", "UIADD3")
def _iadd3(one: Instruction) -> Made:
    """Up to two carries out in front, two in behind (.X)."""
    texts, outs = list(one.operands[1:]), []
    while texts[0].lstrip("!")[0] == "P":
        outs.append(int(texts.pop(0)[1].replace("T", "7")))
    terms, extended = texts[: 2 if one.base == "VIADD" else 3], ".X" in one.opcode
    carries = [predicate(text) for text in texts[3:]] if extended else []
    negative = [text.startswith("-") for text in terms]
    reads = [as_int(text.lstrip("-") if not text.startswith("-0x") else text) for text in terms]
    negative = [n and not text.startswith("-0x") for n, text in zip(negative, terms, strict=True)]
    write = result(one.operands[0])

    def run(state: State) -> None:
        total: Any = np.uint64(0)
        for minus, read in zip(negative, reads, strict=True):
            value = _long(read(state))
            total = total + ((np.uint64(1 << 32) - value) if minus else value)
        for carry in carries:
            total = total + _long(carry(state))
        for at, out in enumerate(outs):
            state.write_predicate(out, total >> _32 > at)
        write(state, total & _LOW)

    return run


@makes("LEA")
def _lea(one: Instruction) -> Made:
    """(a << s) + b, or with .HI of the upper word of (c a) << s."""
    how, texts, out = one.opcode.split(".")[1:], list(one.operands[1:]), 7
    if texts[0][0] == "P":
        out = int(texts.pop(0)[1].replace("T", "7"))
    target, a, b = register(one.operands[0]), as_int(texts[0]), as_int(texts[1])
    if "HI" not in how:
        shift = np.uint64(int(texts[2], 16))

        def low(state: State) -> None:
            total = ((_long(a(state)) << shift) & _LOW) + _long(b(state))
            state.write_predicate(out, total >> _32 > 0)
            state.write(target, total & _LOW)

        return low
    signed = "SX32" in how
    c = as_int("RZ") if signed else as_int(texts.pop(2))
    shift = np.uint64(int(texts[2], 16))
    carry = predicate(texts[3]) if "X" in how else None

    def high(state: State) -> None:
        first = a(state)
        upper = (_signed(first) >> 31).view(np.uint32) if signed else c(state)
        total = (((_long(upper) << _32) | _long(first)) << shift) >> _32
        total = total + _long(b(state)) + (_long(carry(state)) if carry else np.uint64(0))
        state.write(target, total & _LOW)

    return high


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


@makes("PLOP3")
def _plop3(one: Instruction) -> Made:
    target, table = int(one.operands[0][1].replace("T", "7")), int(one.operands[5], 16)
    if one.operands[1] != "PT":
        raise ValueError("two results")
    a, b, c = map(predicate, one.operands[2:5])

    def run(state: State) -> None:
        row = 4 * a(state).astype(np.int64) + 2 * b(state) + c(state)
        state.write_predicate(target, (table >> row & 1).astype(bool))

    return run


@makes("ISETP")
def _isetp(one: Instruction) -> Made:
    how = one.opcode.split(".")[1:]
    unsigned, extended, joined = "U32" in how, "EX" in how, "OR" in how
    if "XOR" in how or one.operands[1] != "PT":
        raise ValueError("two results, or xor")
    target, a, b = int(one.operands[0][1]), as_int(one.operands[2]), as_int(one.operands[3])
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
        state.write_predicate(target, found | last if joined else found & last)

    return run


@makes("SEL")
def _sel(one: Instruction) -> Made:
    target, a, b = register(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    which = predicate(one.operands[3])
    return lambda state: state.write(target, np.where(which(state), a(state), b(state)))


@makes("IABS")
def _iabs(one: Instruction) -> Made:
    target, a = register(one.operands[0]), as_int(one.operands[1])
    return lambda state: state.write(target, np.abs(_signed(a(state))).view(np.uint32))


@makes("IMNMX", "VIMNMX", "VIADDMNMX")
def _extreme(one: Instruction) -> Made:
    """The smaller where the predicate holds, else the larger."""
    unsigned, texts, target = "U32" in one.opcode, list(one.operands[1:]), register(one.operands[0])
    first = as_int(texts.pop(0))
    added = as_int(texts.pop(0)) if one.base == "VIADDMNMX" else None
    second, smaller = as_int(texts[0]), predicate(texts[1])

    def run(state: State) -> None:
        x, y = first(state) + added(state) if added else first(state), second(state)
        if not unsigned:
            x, y = _signed(x), _signed(y)
        state.write(target, np.where(smaller(state), np.minimum(x, y), np.maximum(x, y)).view(np.uint32))

    return run


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


@makes("P2R")
def _p2r(one: Instruction) -> Made:
    target, mask = register(one.operands[0]), int(one.operands[3], 16)

    def run(state: State) -> None:
        bits = sum(state.predicates[i].astype(np.uint32) << np.uint32(i) for i in range(7))
        state.write(target, np.asarray(bits) & np.uint32(mask))

    return run


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


@makes("ULEA", "UIMAD")
def _uniform(one: Instruction) -> Made:
    """Once a warp. A sum of 64 bits carries by UP0."""
    target, how = register(one.operands[0]), one.opcode.split(".")[1:]
    if one.base == "UIMAD":
        a, b, c = map(as_int, one.operands[1:4])

        def multiply(state: State) -> None:
            total = _long(a(state)) * _long(b(state)) + _long(c(state))
            state.uniform[target] = total & _LOW
            if "WIDE" in how:
                state.uniform[target + 1] = total >> _32

        return multiply
    if "HI" in how:
        low, b, c, shift = (as_int(text) for text in one.operands[1:5])

        def high(state: State) -> None:
            pair = (_long(c(state)) << _32) | _long(low(state))
            carry = state.uniform_predicates[0].astype(np.uint64)
            state.uniform[target] = ((pair << _long(shift(state)) >> _32) + _long(b(state)) + carry) & _LOW

        return high
    a, b, shift = (as_int(text) for text in one.operands[2:5])

    def add(state: State) -> None:
        total = ((_long(a(state)) << _long(shift(state))) & _LOW) + _long(b(state))
        state.uniform_predicates[0] = total >> _32 > 0
        state.uniform[target] = total & _LOW

    return add
