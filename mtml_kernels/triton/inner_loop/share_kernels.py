"""What a tile adds to the sums of its columns, before its program stores them as its share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_moments", "column_sum"]


@triton.jit
def column_sum(x, live):
    """Over the rows of a tile  # [1, C]"""
    return tl.sum(tl.where(live, x, 0.0), 0)[None, :]


@triton.jit
def add_moments(
    mean, left, rest,  # [1, C]
    seen, x, live, count,
):  # fmt: skip
    """(mean, left, rest, seen) of `seen` rows and of the `count` rows of a tile x more.

    left = sum (x - mean) / n and rest = sum (x - mean - left)^2, with the first tile's mean, as it is rounded, for all:
    of the squares of what is left no digits are lost, be the mean as large as it may. Tiles are put together as
    rest + rest_1 + n n_1 / (n + n_1) (o - o_1)^2, o = mean + left.
    """
    rows = tl.maximum(count, 1)
    average = column_sum(x, live) / rows
    apart = x - average
    off = column_sum(apart, live) / rows
    squares = column_sum(apart * apart, live) - off * off * count
    base = tl.where(seen == 0, average, mean)
    step = average - base + off - left
    every = seen + count
    left += step * count / every
    rest += squares + step * step * (seen * count) / every
    return base, left, rest, every
