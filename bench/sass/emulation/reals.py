"""Instructions on real numbers. A fused multiply-add is one of float64, rounded: exact but for double roundings."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.sass.emulation.operands import as_double, as_float, as_int, predicate, register
from bench.sass.emulation.state import State
from bench.sass.emulation.table import COMPARE, Made, makes
from bench.sass.listing import Instruction

__all__: list[str] = []


def _checked(one: Instruction, *known: str) -> set[str]:
    """The qualifiers. Raises ValueError for others than these."""
    how = set(one.opcode.split(".")[1:])
    if how - set(known):
        raise ValueError(f"{one.opcode}: not known here")
    return how


@makes("FFMA")
def _ffma(one: Instruction) -> Made:
    how = _checked(one, "SAT", "FTZ", "RM", "RZ", "RP")
    target, (a, b, c) = register(one.operands[0]), map(as_float, one.operands[1:4])

    def run(state: State) -> None:
        exact = a(state).astype(np.float64) * b(state) + c(state)
        rounded = exact.astype(np.float32)
        if "SAT" in how:
            rounded = np.clip(np.nan_to_num(rounded), 0, 1)
        elif "RM" in how:
            rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
        elif how & {"RZ", "RP"}:
            raise ValueError(one.opcode)
        state.write_float(target, rounded)

    return run


@makes("FADD", "FMUL")
def _two(one: Instruction) -> Made:
    _checked(one, "FTZ")
    target, a, b = register(one.operands[0]), as_float(one.operands[1]), as_float(one.operands[2])
    if one.base == "FADD":
        return lambda state: state.write_float(target, a(state) + b(state))
    return lambda state: state.write_float(target, a(state) * b(state))


@makes("FSEL")
def _fsel(one: Instruction) -> Made:
    target, a, b = register(one.operands[0]), as_float(one.operands[1]), as_float(one.operands[2])
    which = predicate(one.operands[3])
    return lambda state: state.write_float(target, np.where(which(state), a(state), b(state)))


@makes("FMNMX")
def _fmnmx(one: Instruction) -> Made:
    how = _checked(one, "NAN")
    target, a, b = register(one.operands[0]), as_float(one.operands[1]), as_float(one.operands[2])
    smaller = predicate(one.operands[3])
    least, most = (np.minimum, np.maximum) if how else (np.fmin, np.fmax)

    def run(state: State) -> None:
        x, y = a(state), b(state)
        state.write_float(target, np.where(smaller(state), least(x, y), most(x, y)))

    return run


def _compared(name: str, x: Any, y: Any) -> Any:
    if name in COMPARE:
        return COMPARE[name](x, y) & ~(np.isnan(x) | np.isnan(y))
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("NAN", "NUM"):
        return unordered if name == "NAN" else ~unordered
    return COMPARE[name.removesuffix("U")](x, y) | unordered


@makes("FSETP")
def _fsetp(one: Instruction) -> Made:
    name, *how = one.opcode.split(".")[1:]
    if one.operands[1] != "PT":
        raise ValueError("two results")
    target, a, b = int(one.operands[0][1]), as_float(one.operands[2]), as_float(one.operands[3])
    before = predicate(one.operands[4])

    def run(state: State) -> None:
        found, last = _compared(name, a(state), b(state)), before(state)
        joined = found | last if "OR" in how else found ^ last if "XOR" in how else found & last
        state.write_predicate(target, joined)

    return run


@makes("FSET")
def _fset(one: Instruction) -> Made:
    name = one.opcode.split(".")[2]
    target, a, b = register(one.operands[0]), as_float(one.operands[1]), as_float(one.operands[2])
    before = predicate(one.operands[3])
    return lambda state: state.write_float(target, (_compared(name, a(state), b(state)) & before(state)) * 1.0)


@makes("FCHK")
def _fchk(one: Instruction) -> Made:
    """Whether a division needs the slow way: of what is very large, very small, or no number."""
    target, a, b = int(one.operands[0][1]), as_float(one.operands[1]), as_float(one.operands[2])

    def run(state: State) -> None:
        x, y = np.abs(a(state)), np.abs(b(state))
        usual = (y > 1e-30) & (y < 1e30) & ((x == 0) | ((x > 1e-30) & (x < 1e30)))
        state.write_predicate(target, ~usual)

    return run


_SPECIAL: dict[str, Callable[[Any], Any]] = {
    "RCP": lambda x: 1 / x,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
}


@makes("MUFU")
def _mufu(one: Instruction) -> Made:
    function, target, a = _SPECIAL[one.opcode.split(".")[1]], register(one.operands[0]), as_float(one.operands[1])
    return lambda state: state.write_float(target, function(a(state).astype(np.float64)).astype(np.float32))


@makes("DADD", "DMUL", "DFMA")
def _double(one: Instruction) -> Made:
    target, reads = register(one.operands[0]), [as_double(text) for text in one.operands[1:]]

    def run(state: State) -> None:
        x, y, *more = (read(state) for read in reads)
        value = x + y if one.base == "DADD" else x * y
        if one.base == "DFMA":
            value = value + more[0]
        state.write_wide(target, np.broadcast_to(value, state.mask.shape).copy())

    return run


@makes("F2F")
def _f2f(one: Instruction) -> Made:
    target, (to, of) = register(one.operands[0]), one.opcode.split(".")[1:3]
    if (to, of) == ("F32", "F64"):
        read = as_double(one.operands[1])
        return lambda state: state.write_float(target, read(state).astype(np.float32))
    if (to, of) != ("F64", "F32"):
        raise ValueError(one.opcode)
    single = as_float(one.operands[1])
    return lambda state: state.write_wide(target, np.broadcast_to(single(state), state.mask.shape).astype(np.float64))


@makes("I2FP", "I2F")
def _i2f(one: Instruction) -> Made:
    """To float32; .RP: rounded upwards, as divisions of integers want it."""
    how = _checked(one, "F32", "S32", "U32", "RP")
    target, a = register(one.operands[0]), as_int(one.operands[1])

    def run(state: State) -> None:
        exact = np.asarray(a(state)).view(np.uint32 if "U32" in how else np.int32).astype(np.float64)
        found = exact.astype(np.float32)
        if "RP" in how:
            found = np.where(found < exact, np.nextafter(found, np.float32(np.inf)), found)
        state.write_float(target, found)

    return run


@makes("F2I")
def _f2i(one: Instruction) -> Made:
    how = _checked(one, "FTZ", "U32", "TRUNC", "NTZ")
    if not how >= {"U32", "TRUNC"}:
        raise ValueError(f"{one.opcode}: not known here")
    target, a = register(one.operands[0]), as_float(one.operands[1])
    return lambda state: state.write(target, np.trunc(np.clip(a(state).astype(np.float64), 0, 2**32 - 1)))


@makes("HFMA2")
def _constant(one: Instruction) -> Made:
    """-0 + two constants of 16 bits: how a register gets a number by the unit of multiply-adds."""
    if one.operands[1:3] != ("-RZ", "RZ"):
        raise ValueError("a product of halves")
    high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in one.operands[3:5])
    target, value = register(one.operands[0]), np.uint32(high << 16 | low)
    return lambda state: state.write(target, value)
