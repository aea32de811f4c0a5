"""Kernels of the weights of samples, a program a task.

w_n = mask_n counts_n      c = w / sum w, 0 where that is 0, or TOTAL w      counts: the id is not ignored
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import IGNORED
from mtml_kernels.triton.inner_loop.operands import power

__all__ = ["mean_kernel", "sample_tile", "weights_back_kernel", "weights_kernel"]

IGNORE = tl.constexpr(IGNORED)


def sample_tile(samples: int) -> int:
    """The launch policy: how many samples a program looks at together.

    A task's samples are few, and its sum is one number: one program, a thousand at a time, 8 for each of 128 threads.
    """
    return power(samples, 1024)


@triton.jit
def mean_kernel(
    each, c,  # [T, N]
    y,  # [T]
    N, each_t, each_n, c_t, c_n,
    HAS_C: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y = sum_n c_n each_n, with c 1 where there is none; MEAN: over N"""
    task = tl.program_id(0).to(tl.int64)
    added = tl.zeros([BLOCK], TYPE)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        x = tl.load(each + task * each_t + n * each_n, mask=n < N, other=0.0).to(TYPE)
        if HAS_C:
            x = x * tl.load(c + task * c_t + n * c_n, mask=n < N, other=0.0).to(TYPE)
        added += x
    found = tl.sum(added, 0)
    if MEAN:
        found = found / N
    tl.store(y + task, found)


@triton.jit
def _weights(mask, ids, n, N, mask_n, ids_n, HAS_MASK: tl.constexpr, HAS_IDS: tl.constexpr, TYPE: tl.constexpr):
    w = (n < N).to(TYPE)
    if HAS_MASK:
        w = tl.load(mask + n * mask_n, mask=n < N, other=0.0).to(TYPE)
    if HAS_IDS:
        w = w * (tl.load(ids + n * ids_n, mask=n < N, other=0) != IGNORE).to(TYPE)
    return w


@triton.jit
def weights_kernel(
    mask, ids,  # [T, N]
    c,  # [T, N]
    total,  # [T]
    N, mask_t, mask_n, ids_t, ids_n,
    HAS_MASK: tl.constexpr, HAS_IDS: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """total = sum w; c = w / total, 0 where total is 0; TOTAL: c = w"""
    task = tl.program_id(0).to(tl.int64)
    mask += task * mask_t
    ids += task * ids_t
    added = tl.zeros([BLOCK], TYPE)
    for first in range(0, N, BLOCK):
        added += _weights(mask, ids, first + tl.arange(0, BLOCK), N, mask_n, ids_n, HAS_MASK, HAS_IDS, TYPE)
    norm = tl.sum(added, 0)
    tl.store(total + task, norm)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        w = _weights(mask, ids, n, N, mask_n, ids_n, HAS_MASK, HAS_IDS, TYPE)
        if not TOTAL:
            w = tl.where(norm == 0, 0.0, w / tl.where(norm == 0, 1.0, norm))
        tl.store(c + task * N + n, w, mask=n < N)


@triton.jit
def weights_back_kernel(
    dc, c,  # [T, N]
    total,  # [T]
    ids,  # [T, N]
    dmask,  # [T, N]
    N, dc_t, dc_n, c_t, c_n, total_t, ids_t, ids_n,
    HAS_IDS: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """dmask = counts (dc - sum c dc) / total, 0 where total is 0; TOTAL: counts dc"""
    task = tl.program_id(0).to(tl.int64)
    mean, norm = tl.full([], 0.0, TYPE), tl.full([], 1.0, TYPE)
    if not TOTAL:
        added = tl.zeros([BLOCK], TYPE)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            own = tl.load(c + task * c_t + n * c_n, mask=n < N, other=0.0).to(TYPE)
            added += own * tl.load(dc + task * dc_t + n * dc_n, mask=n < N, other=0.0).to(TYPE)
        mean = tl.sum(added, 0)
        norm = tl.load(total + task * total_t).to(TYPE)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        found = tl.load(dc + task * dc_t + n * dc_n, mask=n < N, other=0.0).to(TYPE) - mean
        found = tl.where(norm == 0, 0.0, found / tl.where(norm == 0, 1.0, norm))
        if HAS_IDS:
            counts = tl.load(ids + task * ids_t + n * ids_n, mask=n < N, other=IGNORE) != IGNORE
            found = tl.where(counts, found, 0.0)
        tl.store(dmask + task * N + n, found, mask=n < N)
