"""Kernels of normalisations by rows: LAYER, RMS, UNIT, each row [F] by itself."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.triton.inner_loop.arithmetic import root
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import power

__all__ = ["RowTile", "row_means_kernel", "row_stats_kernel", "row_tile"]

LAYER = tl.constexpr(int(Norm.LAYER))
UNIT = tl.constexpr(int(Norm.UNIT))


class RowTile(NamedTuple):
    """`rows` by one program, `cols` of their features at a time."""

    rows: int
    cols: int


def row_tile(rows: int, features: int) -> RowTile:
    """The launch policy.

    1024 numbers at a time, 8 for each of 128 threads, of four operands at most. Rows of up to 1024 features are read
    once; rows of fewer share a program, as far as there are so many. Reasoned, not yet measured.
    """
    cols = power(features, 1024)
    return RowTile(power(rows, 1024 // cols), cols)


@triton.jit
def row_stats_kernel(
    x,  # [T, M, F]
    mean, rstd,  # [T, M]
    M, F, x_t, x_m, x_f,
    KIND: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """LAYER: mean = sum x / F and rstd = (sum (x - mean)^2 / F + EPS)^(-1/2), in two passes as moments_kernel.

    RMS: rstd = (sum x^2 / F + EPS)^(-1/2). UNIT: rstd = 1 / max(|x|, EPS).
    """
    task, block = task_and_block(tl.cdiv(M, ROWS))
    m = block * ROWS + tl.arange(0, ROWS)
    x_at = x + task * x_t + m.to(tl.int64)[:, None] * x_m
    average = tl.zeros([ROWS], TYPE)
    if KIND == LAYER:
        for n in range(0, F, COLS):
            f = n + tl.arange(0, COLS)[None, :]
            average += tl.sum(tl.load(x_at + f * x_f, mask=(m < M)[:, None] & (f < F), other=0.0).to(TYPE), 1)
        average = average / F
    left = tl.zeros([ROWS], TYPE)
    squares = tl.zeros([ROWS], TYPE)
    for n in range(0, F, COLS):
        f = n + tl.arange(0, COLS)[None, :]
        live = (m < M)[:, None] & (f < F)
        value = tl.load(x_at + f * x_f, mask=live, other=0.0).to(TYPE)
        if KIND == LAYER:
            value = tl.where(live, value - average[:, None], 0.0)
            left += tl.sum(value, 1)
        squares += tl.sum(value * value, 1)
    left = left / F
    squares = squares - left * left * F
    average = average + left
    if KIND == LAYER:
        tl.store(mean + task * M + m, average, mask=m < M)
    if KIND == UNIT:
        length = root(squares)
        least = tl.full([ROWS], EPS, TYPE)
        spread = 1.0 / tl.where(length < least, least, length)  # NaN stays
    else:
        spread = 1.0 / root(squares / F + EPS)
    tl.store(rstd + task * M + m, spread, mask=m < M)


@triton.jit
def row_means_kernel(
    d, dt, xhat, xhat_t,  # [T, M, F]
    rstd,  # [T, M]
    w, wt,  # [T, F]
    u1, u2,  # [T, M]
    M, F,
    d_t, d_m, d_f, dt_t, dt_m, dt_f, x_t, x_m, x_f, xt_t, xt_m, xt_f, r_t, r_m, w_t, w_f, wt_t, wt_f,
    HAS_D: tl.constexpr, HAS_DT: tl.constexpr, HAS_XT: tl.constexpr, HAS_W: tl.constexpr, HAS_WT: tl.constexpr,
    FIRST: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """u2 = sum (et xhat + e xhat_t) / F and, where FIRST, u1 = sum et / F, with e = w d, et = w dt + wt d.

    UNIT: the sums themselves, and 0 where the length is below EPS.
    """
    task, block = task_and_block(tl.cdiv(M, ROWS))
    m = block * ROWS + tl.arange(0, ROWS)
    row = m.to(tl.int64)[:, None]
    s1 = tl.zeros([ROWS], TYPE)
    s2 = tl.zeros([ROWS], TYPE)
    for n in range(0, F, COLS):
        f = n + tl.arange(0, COLS)[None, :]
        live = (m < M)[:, None] & (f < F)
        x = tl.load(xhat + task * x_t + row * x_m + f * x_f, mask=live, other=0.0).to(TYPE)
        et = tl.zeros([ROWS, COLS], TYPE)
        bent = tl.zeros([ROWS, COLS], TYPE)
        if HAS_DT:
            et = tl.load(dt + task * dt_t + row * dt_m + f * dt_f, mask=live, other=0.0).to(TYPE)
        if HAS_D:
            own = tl.load(d + task * d_t + row * d_m + f * d_f, mask=live, other=0.0).to(TYPE)
            if HAS_XT:
                bent = own * tl.load(xhat_t + task * xt_t + row * xt_m + f * xt_f, mask=live, other=0.0).to(TYPE)
        if HAS_W:
            scale = tl.load(w + task * w_t + f * w_f, mask=f < F, other=0.0).to(TYPE)
            et = et * scale
            bent = bent * scale
        if HAS_WT:
            if HAS_D:
                et += own * tl.load(wt + task * wt_t + f * wt_f, mask=f < F, other=0.0).to(TYPE)
        s1 += tl.sum(et, 1)
        s2 += tl.sum(et * x + bent, 1)
    if KIND == UNIT:
        spread = tl.load(rstd + task * r_t + m * r_m, mask=m < M, other=0.0)
        long = spread < 1.0 / tl.full([ROWS], EPS, TYPE)
        s1 = tl.where(long, s1, 0.0)
        s2 = tl.where(long, s2, 0.0)
    else:
        s1 = s1 / F
        s2 = s2 / F
    if FIRST:
        tl.store(u1 + task * M + m, s1, mask=m < M)
    tl.store(u2 + task * M + m, s2, mask=m < M)
