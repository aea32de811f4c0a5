"""Products on matrix units, by what lanes of a warp hold of them (PTX: mma.m16n8k8)."""

from __future__ import annotations

import numpy as np

from bench.sass.emulation.operands import register
from bench.sass.emulation.state import LANES, RZ, Array, State
from bench.sass.emulation.table import Made, makes
from bench.sass.listing import Instruction

__all__: list[str] = []

_GROUP, _WITHIN = np.divmod(np.arange(LANES), 4)


def _tf32(state: State, first: int, count: int) -> Array:
    """[count, warps, 32] of neighbouring registers; the unit reads 10 bits of each fraction."""
    words = state.registers[first : first + count] & np.uint32(0xFFFFE000)
    return words.view(np.float32).astype(np.float64)


def _cut(exact: Array) -> Array:
    """To float32, towards zero."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


@makes("HMMA")
def _hmma(one: Instruction) -> Made:
    """D [16, 8] = A [16, 8] B [8, 8] + C; what the accumulator has no room for is cut off."""
    if one.opcode != "HMMA.1688.F32.TF32":
        raise ValueError(f"{one.opcode}: not known here")
    target, left, right, added = map(register, one.operands[:4])

    def run(state: State) -> None:
        if not (state.mask.all(1) | ~state.mask.any(1)).all():
            raise ValueError("a product of some lanes")
        of_a, of_b = _tf32(state, left, 4), _tf32(state, right, 2)
        a, b = np.empty((state.warps, 16, 8)), np.empty((state.warps, 8, 8))
        for i in range(4):
            a[:, _GROUP + 8 * (i % 2), _WITHIN + 4 * (i // 2)] = of_a[i]
        for i in range(2):
            b[:, _WITHIN + 4 * i, _GROUP] = of_b[i]
        product = a @ b
        for i in range(4):
            before = state.floats[added + i] if added != RZ else np.float32(0)
            exact = product[:, _GROUP + 8 * (i // 2), 2 * _WITHIN + i % 2] + before
            state.write_float(target + i, _cut(exact))

    return run
