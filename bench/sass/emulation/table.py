"""Which function makes an instruction of SASS into one that runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.sass.emulation.operands import constant, register
from bench.sass.emulation.state import State
from bench.sass.listing import Instruction

__all__ = ["COMPARE", "MAKERS", "Made", "makes", "number_of"]

Made = Callable[[State], None]
MAKERS: dict[str, Callable[[Instruction], Made]] = {}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


def makes(*opcodes: str) -> Callable[[Callable[[Instruction], Made]], Callable[[Instruction], Made]]:
    """Registers the maker of opcodes, by what stands before their first dot."""

    def keep(maker: Callable[[Instruction], Made]) -> Callable[[Instruction], Made]:
        MAKERS.update(dict.fromkeys(opcodes, maker))
        return maker

    return keep


def number_of(text: str) -> tuple[Callable[[State, int], Any], int]:
    """What reads 64 bits of registers: general ones, uniform ones, or none."""
    if text in ("RZ", "URZ"):
        return lambda state, number: np.uint64(0), 0
    if text.startswith("c["):
        bank, _, at = constant(text)
        return lambda state, number: state.constants[bank][number : number + 2].view(np.uint64)[0], at // 4
    if text.lstrip("-").startswith("0x"):
        value = np.uint64(int(text, 16) & 0xFFFFFFFFFFFFFFFF)
        return lambda state, number: value, 0
    if not text.startswith("U"):
        return lambda state, number: state.wide(number), register(text)

    def uniform(state: State, number: int) -> Any:
        low, high = state.uniform[number], state.uniform[number + 1]
        return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))

    return uniform, register(text)
