"""Kernels of normalisations by columns: of every feature, sums over rows; and what becomes of them.

Sets b are tasks (BATCH) or samples (GROUP). A program takes a chunk of a set's rows; where a set has one chunk and a
feature is normalised alone, it finishes what it has begun, else a second launch puts chunks and features together.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mtml_kernels.triton.inner_loop.arithmetic import root
from mtml_kernels.triton.inner_loop.operands import power

__all__ = ["ColumnTile", "column_kernel", "column_tile", "means_kernel", "moments_kernel", "rstd_kernel"]


class ColumnTile(NamedTuple):
    """`rows` x `cols` (features) at a time, `chunk` rows by one program."""

    rows: int
    cols: int
    chunk: int


def column_tile(rows: int, features: int) -> ColumnTile:
    """The launch policy.

    Up to 64 features are neighbours in memory: 256 bytes a row, whole sectors. 1024 numbers at a time are 8 for each of
    128 threads, and of four operands and four sums 64 registers. A chunk of 256 rows is 64 KB of float32, which L1 may
    hold for a second pass; it makes 58 programs of a batch statistic [75 x 196, 64] and 16 of [5 x 784, 64], so that
    few tasks fill a GPU, while the second launch adds up few. Of one set's shape alone. Reasoned, not yet measured.
    """
    cols = power(features, 64)
    height = power(rows, 1024 // cols)
    return ColumnTile(height, cols, max(256, height))


@triton.jit
def moments_kernel(
    x,  # [B, M, F]
    mean, left, rest,  # [B, chunks, F]
    M, F, x_b, x_m, x_f,
    EPS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """mean of a chunk's n rows, as it is rounded, left = sum (x - mean) / n and rest = sum (x - mean - left)^2.

    WHOLE, of a set of one chunk: mean + left in place of mean, and (rest / n + EPS)^(-1/2) of rest. In two passes, of
    which the second finds the chunk in L1 or L2: a difference of squares loses digits where the mean is large.
    """
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.program_id(2) * COLS + tl.arange(0, COLS)
    start = chunk * CHUNK
    count = tl.minimum(M - start, CHUNK)
    x_at = x + b * x_b + start.to(tl.int64) * x_m + f[None, :] * x_f
    added = tl.zeros([ROWS, COLS], TYPE)
    for n in range(0, count, ROWS):
        m = n + tl.arange(0, ROWS)[:, None]
        added += tl.load(x_at + m * x_m, mask=(m < count) & (f < F)[None, :], other=0.0).to(TYPE)
    average = tl.sum(added, 0) / count
    added = tl.zeros([ROWS, COLS], TYPE)
    squares = tl.zeros([ROWS, COLS], TYPE)
    for n in range(0, count, ROWS):
        m = n + tl.arange(0, ROWS)[:, None]
        live = (m < count) & (f < F)[None, :]
        apart = tl.load(x_at + m * x_m, mask=live, other=0.0).to(TYPE) - average[None, :]
        apart = tl.where(live, apart, 0.0)
        added += apart
        squares += apart * apart
    off = tl.sum(added, 0) / count
    variance = tl.sum(squares, 0) - off * off * count
    at = (b * tl.num_programs(1) + chunk) * F + f
    if WHOLE:
        average = average + off
        variance = 1.0 / root(variance / count + EPS)
    else:
        tl.store(left + at, off, mask=f < F)
    tl.store(mean + at, average, mask=f < F)
    tl.store(rest + at, variance, mask=f < F)


@triton.jit
def rstd_kernel(
    mean, left, rest,  # [B, chunks, F]
    out_mean, out_rstd,  # [B, G]
    M, CHUNKS,
    G: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    EPS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of a group of D features and all chunks p, of n_p numbers each, with o_p = mean_p + left_p less the first mean_0:

    o = sum n_p o_p / (M D)      mean = mean_0 + o      rstd = (sum (rest_p + n_p (o_p - o)^2) / (M D) + EPS)^(-1/2)
    """
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * COLS + tl.arange(0, COLS)
    g = lanes[None, :]
    at = b * CHUNKS * (G * D) + g * D
    numbers = M * D
    base = tl.load(mean + at, mask=g < G, other=0.0)
    added = tl.zeros([PARTS, COLS], TYPE)
    for first in range(0, CHUNKS * D, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]
        live = (p < CHUNKS * D) & (g < G)
        n = tl.minimum(M - p // D * CHUNK, CHUNK)
        place = at + p // D * (G * D) + p % D
        off = tl.load(mean + place, mask=live, other=0.0) - base + tl.load(left + place, mask=live, other=0.0)
        added += tl.where(live, n * off, 0.0)
    middle = tl.sum(added, 0) / numbers
    added = tl.zeros([PARTS, COLS], TYPE)
    for first in range(0, CHUNKS * D, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]
        live = (p < CHUNKS * D) & (g < G)
        n = tl.minimum(M - p // D * CHUNK, CHUNK)
        place = at + p // D * (G * D) + p % D
        off = tl.load(mean + place, mask=live, other=0.0) - base + tl.load(left + place, mask=live, other=0.0)
        off = off - middle[None, :]
        added += tl.where(live, tl.load(rest + place, mask=live, other=0.0) + n * off * off, 0.0)
    variance = tl.sum(added, 0) / numbers
    average = tl.load(mean + b * CHUNKS * (G * D) + lanes * D, mask=lanes < G, other=0.0) + middle
    tl.store(out_mean + b * G + lanes, average, mask=lanes < G)
    tl.store(out_rstd + b * G + lanes, 1.0 / root(variance + EPS), mask=lanes < G)


@triton.jit
def column_kernel(
    d, dt, xhat, xhat_t,  # [B, M, F]
    w, wt,  # [T, F]
    sums,  # [4, B, chunks, F]: A1, A2, B1, B2
    u1, u2,  # [B, F]
    M, F, size,
    d_b, d_m, d_f, dt_b, dt_m, dt_f, x_b, x_m, x_f, xt_b, xt_m, xt_f, w_t, w_f, wt_t, wt_f,
    HAS_D: tl.constexpr, HAS_DT: tl.constexpr, HAS_XT: tl.constexpr, HAS_W: tl.constexpr, HAS_WT: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A1 = sum dt, A2 = sum (dt xhat + d xhat_t), and HAS_WT B1 = sum d, B2 = sum d xhat, of a chunk's rows.

    WHOLE: u1 = (w A1 + wt B1) / M and u2 = (w A2 + wt B2) / M, of a set of one chunk.
    """
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.program_id(2) * COLS + tl.arange(0, COLS)
    start = chunk * CHUNK
    count = tl.minimum(M - start, CHUNK)
    row = start.to(tl.int64)
    zeros = tl.zeros([ROWS, COLS], TYPE)
    a1, a2, b1, b2 = zeros, zeros, zeros, zeros
    for n in range(0, count, ROWS):
        m = n + tl.arange(0, ROWS)[:, None]
        live = (m < count) & (f < F)[None, :]
        x = tl.load(xhat + b * x_b + (row + m) * x_m + f[None, :] * x_f, mask=live, other=0.0).to(TYPE)
        if HAS_DT:
            own = tl.load(dt + b * dt_b + (row + m) * dt_m + f[None, :] * dt_f, mask=live, other=0.0).to(TYPE)
            a1 += own
            a2 += own * x
        if HAS_D:
            own = tl.load(d + b * d_b + (row + m) * d_m + f[None, :] * d_f, mask=live, other=0.0).to(TYPE)
            if HAS_XT:
                moved = xhat_t + b * xt_b + (row + m) * xt_m + f[None, :] * xt_f
                a2 += own * tl.load(moved, mask=live, other=0.0).to(TYPE)
            if HAS_WT:
                b1 += own
                b2 += own * x
    s1, s2 = tl.sum(a1, 0), tl.sum(a2, 0)
    at = (b * tl.num_programs(1) + chunk) * F + f
    tl.store(sums + at, s1, mask=f < F)
    tl.store(sums + size + at, s2, mask=f < F)
    if HAS_WT:
        t1, t2 = tl.sum(b1, 0), tl.sum(b2, 0)
        if not WHOLE:
            tl.store(sums + 2 * size + at, t1, mask=f < F)
            tl.store(sums + 3 * size + at, t2, mask=f < F)
    if WHOLE:
        if HAS_W:
            scale = tl.load(w + b * w_t + f * w_f, mask=f < F, other=0.0).to(TYPE)
            s1 = s1 * scale
            s2 = s2 * scale
        if HAS_WT:
            scale = tl.load(wt + b * wt_t + f * wt_f, mask=f < F, other=0.0).to(TYPE)
            s1 += t1 * scale
            s2 += t2 * scale
        tl.store(u1 + at, s1 / count, mask=f < F)
        tl.store(u2 + at, s2 / count, mask=f < F)


@triton.jit
def means_kernel(
    sums,  # [4, B, chunks, F]: A1, A2, B1, B2
    w, wt,  # [T, F]
    u1, u2,  # [B, G]
    dw, db,  # [B, G]
    M, CHUNKS, size, samples, w_t, w_f, wt_t, wt_f,
    G: tl.constexpr, D: tl.constexpr, HAS_W: tl.constexpr, HAS_WT: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    PARTS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """u1 = sum (w A1 + wt B1) / (M D), u2 = sum (w A2 + wt B2) / (M D), over a group's D features and all chunks.

    DW, DB, of features that are alone in their group: dw = sum A2, db = sum A1.
    """
    b = tl.program_id(0).to(tl.int64)
    task = b // samples
    g = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    at = sums + b * CHUNKS * (G * D) + g * D
    first_u = tl.zeros([PARTS, COLS], TYPE)
    second_u = tl.zeros([PARTS, COLS], TYPE)
    of_w = tl.zeros([PARTS, COLS], TYPE)
    of_b = tl.zeros([PARTS, COLS], TYPE)
    for first in range(0, CHUNKS * D, PARTS):
        p = first + tl.arange(0, PARTS)[:, None]
        live = (p < CHUNKS * D) & (g < G)
        place = at + p // D * (G * D) + p % D
        s1 = tl.load(place, mask=live, other=0.0)
        s2 = tl.load(place + size, mask=live, other=0.0)
        if DW:
            of_w += s2
        if DB:
            of_b += s1
        if HAS_W:
            scale = tl.load(w + task * w_t + (g * D + p % D) * w_f, mask=live, other=0.0).to(TYPE)
            s1 = s1 * scale
            s2 = s2 * scale
        if HAS_WT:
            scale = tl.load(wt + task * wt_t + (g * D + p % D) * wt_f, mask=live, other=0.0).to(TYPE)
            s1 += scale * tl.load(place + 2 * size, mask=live, other=0.0)
            s2 += scale * tl.load(place + 3 * size, mask=live, other=0.0)
        first_u += s1
        second_u += s2
    numbers = M * D
    lanes = tl.program_id(1) * COLS + tl.arange(0, COLS)
    tl.store(u1 + b * G + lanes, tl.sum(first_u, 0) / numbers, mask=lanes < G)
    tl.store(u2 + b * G + lanes, tl.sum(second_u, 0) / numbers, mask=lanes < G)
    if DW:
        tl.store(dw + b * G + lanes, tl.sum(of_w, 0), mask=lanes < G)
    if DB:
        tl.store(db + b * G + lanes, tl.sum(of_b, 0), mask=lanes < G)
