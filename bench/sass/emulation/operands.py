"""Operands of SASS as text, and as what reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.sass.emulation.state import RZ, State

__all__ = [
    "Address",
    "Read",
    "address",
    "as_double",
    "as_float",
    "as_int",
    "constant",
    "predicate",
    "register",
    "result",
]

NO_UNIFORM = 63
Read = Callable[[State], Any]
_REGISTER = re.compile(r"^([-~]?)(\|?)(U?R)(\d+|Z)\b")
_CONSTANT = re.compile(r"^([-~]?)(\|?)c\[(0x\w+)\]\[(?:(R\d+|RZ|UR\d+)\+?)?(-?0x[0-9a-f]+)?\]")
_PREDICATE = re.compile(r"^(!?)(U?P)([0-6T])$")
_ADDRESS = re.compile(r"\[((?:R\d+|RZ)(?:\.64|\.U32|\.X\d+)*)?\+?(UR\d+)?\+?(-?0x[0-9a-f]+)?\]$")


def register(text: str) -> int:
    """The number of a register, general or uniform."""
    found = _REGISTER.match(text)
    if found is None:
        raise ValueError(f"no register: {text}")
    return (RZ if found[3] == "R" else NO_UNIFORM) if found[4] == "Z" else int(found[4])


def constant(text: str) -> tuple[int, str, int]:
    """(bank, register that is added or "", bytes) of `c[bank][...]`."""
    found = _CONSTANT.match(text)
    if found is None:
        raise ValueError(f"no constant: {text}")
    return int(found[3], 16), found[4] or "", int(found[5] or "0", 16)


def predicate(text: str) -> Read:
    """What reads P0, !P0, PT, UP0."""
    found = _PREDICATE.match(text)
    if found is None:
        raise ValueError(f"no predicate: {text}")
    number, uniform, negated = 7 if found[3] == "T" else int(found[3]), found[2] == "UP", bool(found[1])

    def read(state: State) -> Any:
        value = (state.uniform_predicates if uniform else state.predicates)[number]
        return ~value if negated else value

    return read


def result(text: str) -> Callable[[State, Any], None]:
    """What writes 32 bits to a register; of a uniform one once a warp."""
    number = register(text)
    if not text.startswith("U"):
        return lambda state, value: state.write(number, value)

    def write(state: State, value: Any) -> None:
        if number != NO_UNIFORM:
            state.write_uniform(number, value)

    return write


def flag(text: str) -> Callable[[State, Any], None]:
    """What writes a predicate, general or uniform."""
    number = 7 if text.endswith("T") else int(text[-1])
    if not text.startswith("U"):
        return lambda state, value: state.write_predicate(number, value)

    def write(state: State, value: Any) -> None:
        if number != 7:
            state.write_uniform_predicate(number, value)

    return write


def _word(text: str) -> Read:
    """The 32 bits of a register or constant, without its sign."""
    found = _REGISTER.match(text)
    if found is not None:
        number = register(text)
        if found[3] == "UR":
            return lambda state: state.uniform[number]
        return lambda state: state.registers[number]
    bank, added, at = constant(text)
    if added and added != "RZ":
        raise ValueError(f"a constant by register: {text}")
    return lambda state: state.constants[bank][at // 4]


def as_int(text: str) -> Read:
    """32 bits as an unsigned number; - and ~ of them."""
    if re.match(r"^-?0x", text):
        value = np.uint32(int(text, 16) & 0xFFFFFFFF)
        return lambda state: value
    read = _word(text)
    if text.startswith("-"):
        return lambda state: np.uint32(0) - read(state)
    if text.startswith("~"):
        return lambda state: ~read(state)
    return read


def _signed(text: str, read: Read) -> Read:
    """- and | | of real numbers."""
    negative, absolute = text.startswith("-"), "|" in text
    if not (negative or absolute):
        return read

    def signed(state: State) -> Any:
        value = np.abs(read(state)) if absolute else read(state)
        return -value if negative else value

    return signed


def _number(text: str) -> float | None:
    try:
        return float(text.strip().lower().replace("qnan", "nan"))
    except ValueError:
        return None


def as_float(text: str) -> Read:
    """A float32."""
    number = _number(text)
    if number is not None:
        value = np.float32(number)
        return lambda state: value
    found = _REGISTER.match(text)
    if found is not None and found[3] == "R":
        own = register(text)
        return _signed(text, lambda state: state.floats[own])
    word = _word(text.lstrip("-"))
    return _signed(text, lambda state: np.asarray(word(state)).view(np.float32))


def as_double(text: str) -> Read:
    """A float64 in two registers, or two words of a constant."""
    number = _number(text)
    if number is not None:
        value = np.float64(number)
        return lambda state: value
    found = _REGISTER.match(text)
    if found is None:
        bank, _, at = constant(text)
        return _signed(text, lambda state: state.constants[bank][at // 4 : at // 4 + 2].view(np.float64)[0])
    own = register(text)
    if found[3] == "UR":
        return _signed(text, lambda state: _pair(state.uniform[own], state.uniform[own + 1]).view(np.float64))
    return _signed(text, lambda state: state.wide(own).view(np.float64))


def _pair(low: Any, high: Any) -> Any:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


class Address(NamedTuple):
    """`[register times scale + uniform register + bytes]`; wide: the register is a pair."""

    register: int
    wide: bool
    scale: int
    uniform: int
    offset: int

    def of(self, state: State) -> Any:
        """In bytes, as 64 bits."""
        base = state.wide(self.register) if self.wide else state.registers[self.register].astype(np.uint64)
        at = base * np.uint64(self.scale) + np.uint64(self.offset & 0xFFFFFFFFFFFFFFFF)
        return at if self.uniform == NO_UNIFORM else at + state.uniform[self.uniform].astype(np.uint64)


def address(text: str) -> Address:
    """Of `[R1+0x10]` or `desc[UR2][R4.64+0x10]`."""
    found = _ADDRESS.search(text)
    if found is None:
        raise ValueError(f"no address: {text}")
    base = found[1] or "RZ"
    scale = int(base.partition(".X")[2] or 1)
    uniform = register(found[2]) if found[2] else NO_UNIFORM
    return Address(register(base), ".64" in base, scale, uniform, int(found[3] or "0", 16))
