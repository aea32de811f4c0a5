"""Kernels of poolings: a program takes a block of one sample's result; neighbouring lanes are neighbouring channels.

Along an axis window i holds the points i S - P + k D, k = 0 .. K - 1, that lie in the image, or where it is adaptive
floor(i H / n) .. ceil((i + 1) H / n) - 1. An average divides by LAST, or for LAST = 0 by the window's points with the
padding, but not beyond it, for LAST = -1 by those in the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.program.layers.pool import Pool

__all__ = ["gather_kernel", "pool_back_kernel", "pool_kernel"]

MAX, ADAPTIVE = tl.constexpr(int(Pool.MAX)), tl.constexpr(int(Pool.ADAPTIVE_AVG))


@triton.jit
def _span(i, KIND: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Where window i begins along an axis, and, adaptive, where it ends."""
    if KIND == ADAPTIVE:
        start, end = i * SIZE // OUT, ((i + 1) * SIZE + OUT - 1) // OUT
    else:
        start, end = i * S - P, i * 0 + SIZE
    return start, end


@triton.jit
def _count(i, KIND: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
           P: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """How many points of window i an average counts along an axis."""
    start, end = _span(i, KIND, SIZE, OUT, S, P)
    if KIND == ADAPTIVE:
        points = end - start
    elif LAST == 0:
        points = tl.minimum(start + K, SIZE + P) - start
    else:
        points = tl.minimum(start + K, SIZE) - tl.maximum(start, 0)
    return points


@triton.jit
def _divisor(
    oh, ow, KIND: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What the sum of window (oh, ow) is divided by."""
    if KIND != ADAPTIVE and LAST > 0:
        count = oh * 0 + LAST
    else:
        count = _count(oh, KIND, H, OH, KH, SH, PH, LAST) * _count(ow, KIND, W, OW, KW, SW, PW, LAST)
    return count.to(TYPE)


@triton.jit
def pool_kernel(
    x,  # [T, N, H W, C]
    y, index,  # [T, N, OH OW, C]
    samples, x_t, x_n, x_r, x_c,
    KIND: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y: of every window the largest of its points, the first of equal ones, or a NaN; or their average."""
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < OH * OW * C
    c, oh, ow = at % C, at // C // OW, at // C % OW
    x_at = x + b // samples * x_t + b % samples * x_n + c * x_c
    top, end_h = _span(oh, KIND, H, OH, SH, PH)
    left, end_w = _span(ow, KIND, W, OW, SW, PW)
    added = tl.zeros([BLOCK], TYPE)
    place = tl.full([BLOCK], -1, tl.int32)
    for k in range(KH * KW):
        h, w = top + k // KW * DH, left + k % KW * DW
        inside = live & (h >= 0) & (h < end_h) & (w >= 0) & (w < end_w)
        value = tl.load(x_at + (h * W + w) * x_r, mask=inside, other=0.0).to(TYPE)
        if KIND == MAX:
            better = inside & ((place < 0) | (value > added) | (value != value))
            added = tl.where(better, value, added)
            place = tl.where(better, h * W + w, place)
        else:
            added += value
    if KIND != MAX:
        added = added / _divisor(oh, ow, KIND, H, W, OH, OW, KH, KW, SH, SW, PH, PW, LAST, TYPE)
    tl.store(y + b * (OH * OW * C) + at, added, mask=live)
    if INDEX:
        tl.store(index + b * (OH * OW * C) + at, place.to(tl.int64), mask=live)


@triton.jit
def gather_kernel(
    x,  # [T, N, H W, C]
    index,  # [T, N, R, C]
    y,  # [T, N, R, C]
    samples, elements, x_t, x_n, x_r, x_c, i_t, i_n, i_r, i_c,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[r, c] = x[index[r, c], c]"""
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live, r, c = at < elements, at // C, at % C
    task, n = b // samples, b % samples
    row = tl.load(index + task * i_t + n * i_n + r * i_r + c * i_c, mask=live, other=0)
    value = tl.load(x + task * x_t + n * x_n + row * x_r + c * x_c, mask=live, other=0.0)
    tl.store(y + b * elements + at, value, mask=live)


@triton.jit
def _last_window(h, KIND: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """The last window that may hold point h along an axis; it may lie beyond the last of all."""
    i = ((h + 1) * OUT + SIZE - 1) // SIZE - 1 if KIND == ADAPTIVE else (h + P) // S
    return i


@triton.jit
def pool_back_kernel(
    d, index,  # [T, N, OH OW, C]
    dx,  # [T, N, H W, C]
    samples, d_t, d_n, d_r, d_c, i_t, i_n, i_r, i_c,
    KIND: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """dx: of every point the sum of d over the windows whose maximum it is, or, divided, over all that hold it."""
    b, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < H * W * C
    c, point = at % C, at // C
    h, w = point // W, point % W
    task, n = b // samples, b % samples
    d_at, index_at = d + task * d_t + n * d_n + c * d_c, index + task * i_t + n * i_n + c * i_c
    low, right = _last_window(h, KIND, H, OH, SH, PH), _last_window(w, KIND, W, OW, SW, PW)
    added = tl.zeros([BLOCK], TYPE)
    for k in range(WH * WW):
        oh, ow = low - k // WW, right - k % WW
        inside = live & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        r = oh * OW + ow
        if KIND == MAX:
            taken = tl.load(index_at + r * i_r, mask=inside, other=-1)
            added += tl.load(d_at + r * d_r, mask=inside & (taken == point), other=0.0).to(TYPE)
        else:
            top, end_h = _span(oh, KIND, H, OH, SH, PH)
            left, end_w = _span(ow, KIND, W, OW, SW, PW)
            if KIND != ADAPTIVE:
                end_h, end_w = top + KH, left + KW
            inside &= (h >= top) & (h < end_h) & (w >= left) & (w < end_w)
            value = tl.load(d_at + r * d_r, mask=inside, other=0.0).to(TYPE)
            share = _divisor(oh, ow, KIND, H, W, OH, OW, KH, KW, SH, SW, PH, PW, LAST, TYPE)
            added += tl.where(inside, value / share, 0.0)
    tl.store(dx + b * (H * W * C) + at, added, mask=live)
