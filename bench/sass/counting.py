"""Instructions by pipe of a multiprocessor, multiply-adds; and a check that none of a product's were missed."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from bench.sass.listing import Instruction
from bench.sass.paths import Path

__all__ = ["Counts", "check", "count", "matrix_macs", "pipe_of", "words_of"]

LANES = 32
# By opcode; what is in none of them only takes its turn to be issued.
FMA = frozenset({"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"})
MAD = frozenset({"IMAD"})
ALU = frozenset(
    {
        *("BMSK", "FCHK", "FMNMX", "FSEL", "FSET", "FSETP", "I2IP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3"),
        *("MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX"),
    }
)
SPECIAL = frozenset({"MUFU", "F2I", "I2F", "F2F", "POPC", "FLO", "BREV", "I2FP", "F2FP"})
MEMORY = frozenset(
    {"LD", "ST", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "SHFL", "ATOMS", "LDL", "STL"}
)  # LD and ST: of memory that the address tells
MATRIX = frozenset({"HMMA", "HGMMA"})
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_HMMA = {"1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16}


def pipe_of(one: Instruction) -> str:
    """The unit that works on it."""
    for name, opcodes in (("fma", FMA), ("mad", MAD), ("alu", ALU), ("special", SPECIAL), ("memory", MEMORY)):
        if one.base in opcodes:
            return name
    return "matrix" if one.base in MATRIX else "other"


def words_of(one: Instruction) -> int:
    """Words of 32 bits that each lane moves, or writes."""
    if "LDSM" in one.base or "STSM" in one.base:
        return int(one.opcode[-1]) if one.opcode[-2] == "." else 1  # STSM.16.M88 is of one matrix
    how = one.opcode.split(".")
    return 4 if "128" in how else 2 if "64" in how or "WIDE" in how else 1


def matrix_macs(one: Instruction) -> int:
    """Multiply-adds of a warp's instruction on the matrix unit; four warps make one of HGMMA together."""
    if one.base == "HGMMA":
        shape = _SHAPE.search(one.opcode)
        assert shape is not None, one.opcode
        return int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    if one.base == "HMMA":
        return _HMMA[one.opcode.split(".")[1]]
    return 0


def _fmas(one: Instruction) -> int:
    """Fused multiply-adds of a warp."""
    return {"FFMA": LANES, "FFMA2": 2 * LANES}.get(one.base, 0)


class Counts(NamedTuple):
    """Of one warp on its way: instructions by pipe, fused multiply-adds, words through shared memory and L1, and
    multiply-adds of the matrix unit, those of mma.sync among them apart.
    """

    by_pipe: Counter[str]
    fma: int
    words: int
    matrix: int
    synchronous: int

    @property
    def issued(self) -> int:
        """All instructions."""
        return self.by_pipe.total()


def count(path: Path) -> Counts:
    """All that a warp issues."""
    by_pipe, fma, words, matrix, synchronous = Counter[str](), 0, 0, 0, 0
    for one, times in path.weighted():
        pipe = pipe_of(one)
        by_pipe[pipe] += times
        fma += times * (one.base in ("FFMA", "FFMA2"))
        words += times * words_of(one) if pipe == "memory" else 0
        matrix += times * matrix_macs(one)
        synchronous += times * matrix_macs(one) if one.base == "HMMA" else 0
    return Counts(by_pipe, fma, words, matrix, synchronous)


def check(path: Path, warps: int) -> None:
    """Raises ValueError where the multiply-adds of products are not those that their tiles take.

    Of FFMA the lines of products have a tile's at most: rows and columns that no thread stores are left out by the
    compiler. On the matrix units small tiles are computed by two or four warps alike; ptxas gives some of these
    instructions the lines of neighbours, so that all of the path's count.
    """
    products = [loop for loop in path.loops if loop.tile]
    if not products:
        return
    found = warps * sum(matrix_macs(one) * times for one, times in path.weighted())
    most = 4 * sum(loop.tile for loop in products)
    if not found:
        own = ((one, n) for one, n in path.weighted() if any(loop.has(*at) for loop in products for at in one.frames))
        found, most = warps * sum(_fmas(one) * times for one, times in own), most // 4
    least = sum(loop.least for loop in products)
    if not least <= found <= most:
        where = f"{products[0].file}:{products[0].first}"
        raise ValueError(f"{where}: {found} multiply-adds found, where the products take {least} to {most}")
