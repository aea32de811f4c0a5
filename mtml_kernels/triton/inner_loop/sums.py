"""Sums over what was broadcast, over rows and over tasks, of values and of products of them, in a fixed order.

y[b, k] = sum_m a[b, m, k] b[b, m, k] + c[b, m, k] d[b, m, k], with absent factors b and d 1, an absent product 0, and
the tasks b, what is summed m and what is kept k each of one or two dimensions. Many m are summed chunk by chunk, by as
many programs, and then the chunks: two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import alike
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import (
    OPTIONS,
    Results,
    new,
    power,
    shape_of,
    spread,
    strides,
    type_of,
)

__all__ = ["SUMS", "SumTile", "sum_kernel", "sum_tile", "total"]

Four = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class SumTile(NamedTuple):
    """`rows` of m times `cols` of k at a time, `chunk` of m by one program."""

    rows: int
    cols: int
    chunk: int


def sum_tile(summed: int, kept: int) -> SumTile:
    """The launch policy.

    2048 numbers at a time are 16 loads in flight for each of 128 threads, along up to 64 neighbours. A program adds up
    eight such tiles in as many accumulators, 64 KB of float32: then a launch's start is a tenth of it, and the sums of
    a small set are one launch. Of one task's shape alone. Reasoned, not yet measured.
    """
    cols = power(kept, 64)
    rows = power(summed, 2048 // cols)
    return SumTile(rows, cols, 8 * rows)


@triton.jit
def _place(i, outer, inner, SPLIT: tl.constexpr):
    """Offset of element i of two dimensions, of which the second has SPLIT elements; or, SPLIT 0, of one."""
    at = i * inner if SPLIT == 0 else i // SPLIT * outer + i % SPLIT * inner
    return at


@triton.jit
def sum_kernel(
    a, b, c, d,  # [B, m, m, k, k] each
    y,  # [B, chunks, K]
    M, K,
    a_t, a_m0, a_m1, a_k0, a_k1,
    b_t, b_m0, b_m1, b_k0, b_k1,
    c_t, c_m0, c_m1, c_k0, c_k1,
    d_t, d_m0, d_m1, d_k0, d_k1,
    SPLIT_M: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_B: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, NEGATED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y[b, chunk, k] = +- sum_m (a b + c d) over the m of a chunk."""
    task, block = task_and_block(tl.cdiv(K, COLS))
    chunk = tl.program_id(1)
    k = block * COLS + tl.arange(0, COLS)
    last = tl.minimum(M, (chunk + 1) * CHUNK)
    added = tl.zeros([ROWS, COLS], TYPE)
    for first in range(chunk * CHUNK, last, ROWS):
        m = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = (m < last) & (k < K)[None, :]
        a_at = a + task * a_t + _place(m, a_m0, a_m1, SPLIT_M) + _place(k, a_k0, a_k1, SPLIT_K)[None, :]
        x = tl.load(a_at, mask=live, other=0.0).to(TYPE)
        if HAS_B:
            b_at = b + task * b_t + _place(m, b_m0, b_m1, SPLIT_M) + _place(k, b_k0, b_k1, SPLIT_K)[None, :]
            x = x * tl.load(b_at, mask=live, other=0.0).to(TYPE)
        if HAS_C:
            c_at = c + task * c_t + _place(m, c_m0, c_m1, SPLIT_M) + _place(k, c_k0, c_k1, SPLIT_K)[None, :]
            z = tl.load(c_at, mask=live, other=0.0).to(TYPE)
            if HAS_D:
                d_at = d + task * d_t + _place(m, d_m0, d_m1, SPLIT_M) + _place(k, d_k0, d_k1, SPLIT_K)[None, :]
                z = z * tl.load(d_at, mask=live, other=0.0).to(TYPE)
            x += z
        added += x
    found = tl.sum(added, 0)
    if NEGATED:
        found = -found
    tl.store(y + (task * tl.num_programs(1) + chunk) * K + k, found, mask=k < K)


class _Axes(NamedTuple):
    """The dimensions of all operands but the tasks', as the kernel has them: sizes, and by operand five strides."""

    summed: list[int]
    kept: list[int]
    strides: list[tuple[int, ...]]


def _axes(sizes: Sequence[int], kept: Sequence[bool], steps: Sequence[Sequence[int]]) -> _Axes | None:
    """Neighbours that are stored as one become one; None where more than two of a kind are left."""
    runs: list[tuple[int, bool, list[int]]] = []
    for size, keep, *step in zip(sizes, kept, *steps, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == keep and all(o == i * size for o, i in zip(runs[-1][2], step, strict=True)):
            runs[-1] = (runs[-1][0] * size, keep, step)
        else:
            runs.append((size, keep, step))
    none = [0] * len(steps)
    pairs = []
    for kind in (False, True):
        found = [(size, step) for size, keep, step in runs if keep == kind]
        if len(found) > 2:
            return None
        pairs.append([(1, none)] * (2 - len(found)) + found)
    (m0, m1), (k0, k1) = pairs
    by_operand = [tuple(axis[1][i] for axis in (m0, m1, k0, k1)) for i in range(len(steps))]
    return _Axes([m0[0], m1[0]], [k0[0], k1[0]], by_operand)


def _launch(
    four: Sequence[Tensor | None], tasks: int, sizes: Sequence[int], kept: Sequence[bool], minus: bool
) -> Tensor:
    """[tasks, chunks, K] of operands that are [tasks, *sizes] or, without tasks, `sizes`."""
    lead = len(next(t for t in four if t is not None).shape) - len(sizes)
    axes = _axes(sizes, kept, [strides(t, lead + len(sizes))[lead:] for t in four])
    if axes is None:
        four = [None if t is None else t.contiguous() for t in four]
        axes = _axes(sizes, kept, [strides(t, lead + len(sizes))[lead:] for t in four])
        assert axes is not None
    a, b, c, d = four
    assert a is not None
    summed, width = axes.summed[0] * axes.summed[1], axes.kept[0] * axes.kept[1]
    tile = sum_tile(summed, width)
    chunks = -(-summed // tile.chunk)
    y = new((tasks, chunks, width), a)
    steps = [(strides(t, lead + 1)[0] if lead else 0, *step) for t, step in zip(four, axes.strides, strict=True)]
    with on(a.device):
        sum_kernel[(tasks * -(-width // tile.cols), chunks)](
            *(a if t is None else t for t in four),
            y,
            summed,
            width,
            *(step for each in steps for step in each),
            axes.summed[1] if axes.summed[0] > 1 else 0,
            axes.kept[1] if axes.kept[0] > 1 else 0,
            b is not None,
            c is not None,
            d is not None,
            minus,
            *tile,
            type_of(a),
            **OPTIONS,
        )
    return y


def total(shape: Sequence[int], *factors: Tensor | None, minus: bool = False) -> Tensor:
    """a b + c d (or less it), broadcast and summed to `shape`, which has as many dimensions, or none.

    Tasks are summed after everything else: so a task's sums are the same whatever tasks stand beside.
    """
    whole = shape_of(*factors)
    to = (1,) * len(whole) if not shape else tuple(shape)
    whole = tuple(own if size == 1 else size for own, size in zip(whole, to, strict=True))
    four = [*spread(whole, *factors), None, None, None][:4]
    like = next(t for t in four if t is not None)
    if not like.numel():
        return new(shape, like).zero_()
    if four[0] is None:
        four = [*four[2:], None, None]
    tasks, kept = whole[0], [size != 1 or n == 1 for n, size in zip(whole, to, strict=True)]
    if kept[0] or not all(kept[1:]):
        y = _launch(four, tasks, whole[1:], kept[1:], minus)
        y = y if kept[0] else y.view(1, -1, y.shape[2])
    else:
        y = _launch(four, 1, whole, kept, minus)
    while y.shape[1] > 1:
        y = _launch([y, None, None, None], y.shape[0], y.shape[1:], [False, True], False)
    return y.view(tuple(shape))


def _reduce(part: Part, x: Tensor) -> Results:
    shape = tuple(part.constants.shape)
    if tuple(x.shape) == shape:
        return (x,)
    extra = x.ndim - len(shape)
    return (total((1,) * extra + shape, x).view(shape),)


def _over_tasks(part: Part, x: Tensor) -> Results:
    return (total((1, *x.shape[1:]), x),)


def _mul_backward(part: Part, d: Tensor | None, dt: Tensor | None, b: Tensor | None, bt: Tensor | None) -> Results:
    pairs = [(x, y) for x, y in ((dt, b), (d, bt)) if x is not None and y is not None]
    if not pairs:
        return (None,)
    factors = [t for pair in pairs for t in pair]
    shape = tuple(part.constants.shape)
    y = total(shape, *factors)
    if shape_of(*factors) != shape:
        return (y,)
    narrow = alike(*pairs[0])[0].dtype  # nothing is summed: a plane like its factors
    return (y if y.dtype == narrow else y.to(narrow),)


SUMS: dict[str, Any] = {
    "reduce": _reduce,
    "mul.backward": _mul_backward,
    "tasks.sum": _over_tasks,
}
