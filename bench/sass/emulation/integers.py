"""Integer and logic instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_int, flag, predicate, register, result
from bench.sass.emulation.state import State
from bench.sass.emulation.table import Made, makes, number_of
from bench.sass.listing import Instruction

__all__: list[str] = []

_OVER: dict[str, Any] = {"SUM": np.sum, "MIN": np.min, "MAX": np.max}
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def _long(value: Any) -> Any:
    return np.asarray(value).astype(np.uint64)


def _signed(value: Any) -> Any:
    return np.asarray(value).view(np.int32)


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
    unsigned = "U32" in one.opcode
    target, a, b = register(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    added, number = number_of(one.operands[3])
    return lambda state: state.write(target, (_product(a(state), b(state), unsigned) + added(state, number)) >> _32)


def _product(a: Any, b: Any, unsigned: bool) -> Any:
    """Of 64 bits."""
    if unsigned:
        return _long(a) * _long(b)
    return (_signed(a).astype(np.int64) * _signed(b).astype(np.int64)).view(np.uint64)


def _wide(one: Instruction, unsigned: bool) -> Made:
    if len(one.operands) != 4:
        raise ValueError("a carry")
    target, a, b = register(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    added, number = number_of(one.operands[3])

    def run(state: State) -> None:
        product = _product(a(state), b(state), unsigned)
        state.write_wide(target, np.broadcast_to(product + added(state, number), state.mask.shape).copy())

    return run


@makes("IADD3", "VIADD", "UIADD3")
def _iadd3(one: Instruction) -> Made:
    """Up to two carries out in front, two in behind (.X)."""
    texts, outs = list(one.operands[1:]), []
    while texts[0].lstrip("U")[0] == "P":
        outs.append(flag(texts.pop(0)))
    terms, extended = texts[: 2 if one.base == "VIADD" else 3], ".X" in one.opcode
    carries = [predicate(text) for text in texts[3:]] if extended else []
    negative = [text.startswith("-") and not text.startswith("-0x") for text in terms]
    reads = [as_int(text[1:] if minus else text) for text, minus in zip(terms, negative, strict=True)]
    write = result(one.operands[0])

    def run(state: State) -> None:
        total: Any = np.uint64(0)
        for minus, read in zip(negative, reads, strict=True):
            value = _long(read(state))
            total = total + ((np.uint64(1 << 32) - value) if minus else value)
        for carry in carries:
            total = total + _long(carry(state))
        for at, out in enumerate(outs):
            out(state, total >> _32 > at)
        write(state, total & _LOW)

    return run


@makes("LEA", "ULEA")
def _lea(one: Instruction) -> Made:
    """(a << s) + b, or with .HI of the upper word of (c a) << s."""
    how, texts = one.opcode.split(".")[1:], list(one.operands[1:])
    out = flag(texts.pop(0) if texts[0].lstrip("U")[0] == "P" else "PT")
    minus = texts[0].startswith("-") and "HI" not in how
    write, a, b = result(one.operands[0]), as_int(texts[0][minus:]), as_int(texts[1])
    if "HI" not in how:
        shift = np.uint64(int(texts[2], 16))

        def low(state: State) -> None:
            shifted = (_long(a(state)) << shift) & _LOW
            total = (np.uint64(1 << 32) - shifted if minus else shifted) + _long(b(state))
            out(state, total >> _32 > 0)
            write(state, total & _LOW)

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
        write(state, total & _LOW)

    return high


@makes("IABS")
def _iabs(one: Instruction) -> Made:
    target, a = register(one.operands[0]), as_int(one.operands[1])
    return lambda state: state.write(target, np.abs(_signed(a(state))).view(np.uint32))


@makes("REDUX")
def _over_lanes(one: Instruction) -> Made:
    """Of all lanes of a warp, in one register for all of them."""
    how, write, a = one.opcode.split(".")[1:], result(one.operands[0]), as_int(one.operands[1])
    if how[0] not in _OVER or (len(how) > 1 and how[1] != "S32"):
        raise ValueError(f"{one.opcode}: not known here")

    def run(state: State) -> None:
        if not (state.mask.all(1) | ~state.mask.any(1)).all():
            raise ValueError("a sum of some lanes")
        found = _OVER[how[0]](np.broadcast_to(_signed(a(state)), state.mask.shape), axis=1, keepdims=True)
        write(state, np.broadcast_to(found, state.mask.shape).astype(np.int32).view(np.uint32))

    return run


@makes("SGXT", "USGXT")
def _sign_extended(one: Instruction) -> Made:
    """The lowest bits, of which the last is the sign."""
    write, a, bits = result(one.operands[0]), as_int(one.operands[1]), as_int(one.operands[2])
    unsigned = "U32" in one.opcode

    def run(state: State) -> None:
        unused = np.int64(64) - np.asarray(bits(state)).astype(np.int64)
        upper = np.asarray(a(state)).astype(np.int64) << unused
        write(state, (upper.view(np.uint64) >> unused.view(np.uint64)) if unsigned else (upper >> unused))

    return run


@makes("FLO", "UFLO")
def _leading_one(one: Instruction) -> Made:
    """Where the highest bit is that is set; -1 of 0."""
    if one.opcode not in ("FLO.U32", "UFLO.U32"):
        raise ValueError(f"{one.opcode}: not known here")
    write, a = result(one.operands[0]), as_int(one.operands[1])
    return lambda state: write(state, np.frexp(np.asarray(a(state)).astype(np.float64))[1] - 1)


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
