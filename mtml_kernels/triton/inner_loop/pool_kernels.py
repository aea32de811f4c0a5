"""Poolings in a tile of an image: points by rows, channels by columns.

Along an axis window i holds the points i S - P + k D, k = 0 .. K - 1, that lie in the image, or where it is adaptive
floor(i H / n) .. ceil((i + 1) H / n) - 1. An average divides by LAST, or for LAST = 0 by the window's points with the
padding, but not beyond it, for LAST = -1 by those in the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.program.layers.pool import Pool

__all__ = ["divided", "larger", "pooled", "pooled_back"]

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
def larger(best, place, value, at, live, KIND: tl.constexpr):
    """Of a maximum the larger one and where it was seen, the first of equal ones, or a NaN; of an average the sum."""
    if KIND == MAX:
        better = live & ((place < 0) | (value > best) | (value != value))
        best = tl.where(better, value, best)
        place = tl.where(better, at, place)
    else:
        best += tl.where(live, value, 0.0)
    return best, place


@triton.jit
def divided(
    best, r, KIND: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
):  # fmt: skip
    """The sums of windows r as averages; a maximum as it is."""
    if KIND != MAX:
        best = best / _divisor(r // OW, r % OW, KIND, H, W, OH, OW, KH, KW, SH, SW, PH, PW, LAST, best.dtype)
    return best


@triton.jit
def pooled(
    x, r, x_r, live,
    KIND: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Windows r of the images at x: the largest of a window's points and its place, or their average."""
    top, end_h = _span(r // OW, KIND, H, OH, SH, PH)
    left, end_w = _span(r % OW, KIND, W, OW, SW, PW)
    best = tl.zeros(live.shape, TYPE)
    place = tl.full(live.shape, -1, tl.int32)
    for k in range(KH * KW):
        h, w = top + k // KW * DH, left + k % KW * DW
        inside = live & (h >= 0) & (h < end_h) & (w >= 0) & (w < end_w)
        value = tl.load(x + (h * W + w) * x_r, mask=inside, other=0.0).to(TYPE)
        best, place = larger(best, place, value, h * W + w, inside, KIND)
    return divided(best, r, KIND, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, LAST, WH, WW), place


@triton.jit
def _last_window(h, KIND: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """The last window that may hold point h along an axis; it may lie beyond the last of all."""
    i = ((h + 1) * OUT + SIZE - 1) // SIZE - 1 if KIND == ADAPTIVE else (h + P) // S
    return i


@triton.jit
def pooled_back(
    d, index, r, d_r, i_r, live,
    KIND: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, LAST: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of points r the sum of d over the windows whose maximum they are, or, divided, over all that hold them."""
    h, w = r // W, r % W
    low, right = _last_window(h, KIND, H, OH, SH, PH), _last_window(w, KIND, W, OW, SW, PW)
    added = tl.zeros(live.shape, TYPE)
    for k in range(WH * WW):
        oh, ow = low - k // WW, right - k % WW
        inside = live & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        window = oh * OW + ow
        if KIND == MAX:
            taken = tl.load(index + window * i_r, mask=inside, other=-1)
            added += tl.load(d + window * d_r, mask=inside & (taken == r), other=0.0).to(TYPE)
        else:
            top, end_h = _span(oh, KIND, H, OH, SH, PH)
            left, end_w = _span(ow, KIND, W, OW, SW, PW)
            if KIND != ADAPTIVE:
                end_h, end_w = top + KH, left + KW
            inside &= (h >= top) & (h < end_h) & (w >= left) & (w < end_w)
            value = tl.load(d + window * d_r, mask=inside, other=0.0).to(TYPE)
            share = _divisor(oh, ow, KIND, H, W, OH, OW, KH, KW, SH, SW, PH, PW, LAST, TYPE)
            added += tl.where(inside, value / share, 0.0)
    return added
