"""Blocks of a linear head's matrices: loads and stores with zeros beyond the edge, and their product."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "CHUNK",
    "get",
    "get_row",
    "get_transposed",
    "number",
    "product",
    "put",
    "put_row",
    "put_transposed",
    "step_scale",
    "times",
]

CHUNK = tl.constexpr(16)


@triton.jit
def get(at, first, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows first ... first + ROWS of a matrix [rows, cols], zeros beyond it."""
    i = first + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :]
    return tl.load(at + i * stride + j, mask=(i < rows) & (j < cols), other=0.0)


@triton.jit
def get_transposed(at, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The transpose of a matrix [rows, cols], as [COLS, ROWS] with zeros beyond it."""
    i = tl.arange(0, ROWS)[None, :]
    j = tl.arange(0, COLS)[:, None]
    return tl.load(at + i * cols + j, mask=(i < rows) & (j < cols), other=0.0)


@triton.jit
def put(at, block, first, rows, cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of `get`."""
    i = first + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :]
    tl.store(at + i * stride + j, block, mask=(i < rows) & (j < cols))


@triton.jit
def put_transposed(at, block, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of `get_transposed`."""
    i = tl.arange(0, ROWS)[None, :]
    j = tl.arange(0, COLS)[:, None]
    tl.store(at + i * cols + j, block, mask=(i < rows) & (j < cols))


@triton.jit
def get_row(at, cols, COLS: tl.constexpr):
    """A row [cols] as [COLS], zeros beyond it."""
    j = tl.arange(0, COLS)
    return tl.load(at + j, mask=j < cols, other=0.0)


@triton.jit
def put_row(at, row, cols, COLS: tl.constexpr):
    """The inverse of `get_row`."""
    j = tl.arange(0, COLS)
    tl.store(at + j, row, mask=j < cols)


@triton.jit
def number(high, low, TYPE: tl.constexpr):
    """A number of 48 bits from two of float32, in which Triton takes numbers."""
    return tl.full([], high, TYPE) + tl.full([], low, TYPE)


@triton.jit
def product(a, b, TYPE: tl.constexpr):
    """a b in full precision: TF32 would lose the digits that second order needs."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=TYPE)


@triton.jit
def times(
    left, left_at, first, rows, stride, right, right_at, S, C, ones: tl.constexpr, TYPE: tl.constexpr,
    ON_CHIP: tl.constexpr, ROWS: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """left right [ROWS, CP], of blocks [ROWS, SP] and [SP, CP]; or of what stands in memory, CHUNK of the S at a time.

    In memory `left_at` has rows `stride` apart, to whose elements `ones` is added, and `right_at` has rows of C.
    """
    if ON_CHIP:
        result = product(left, right, TYPE)
    else:
        tl.debug_barrier()  # other threads wrote what this one reads
        result = tl.zeros([ROWS, CP], TYPE)
        for j in range(0, S, CHUNK):
            piece = get(left_at + j, first, rows, S - j, stride, ROWS, CHUNK) + ones
            result += product(piece, get(right_at, j, S, C, C, CHUNK, CP), TYPE)
    return result


@triton.jit
def step_scale(scale, alpha, m, proximal, DECAYS: tl.constexpr):
    """u (or v) after a step."""
    if DECAYS:
        scale = (1.0 - alpha * m) * scale + alpha * proximal
    return scale
