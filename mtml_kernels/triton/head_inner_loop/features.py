"""The features of few samples and classes: their products in one launch, and their gradients in one, with all sums in
another.

Before: F [F_s; W]^T = [gram, zs; cross, zq], [S + Q, S + C], of F [S + Q, D], support rows and query rows. A program
has a block of the rows, and each lane of a warp its own part of the D columns: lanes meet in one sum at the end.

After: a program has all S + Q rows of a task and a block of the D columns, each thread whole columns of them: nothing
passes between threads, and what has rank C is never spread out. With a, dq, dgram, dzs, u of that package:
    own = u W - a^T F_s;  p = dq^T F_q                                                            [C, D]
    dF_s = (dgram + dgram^T) F_s + dzs W - a p;  dF_q = dq own;  a task's share of dW = dzs^T F_s + u p
The shares, and dbias and the rates' gradients behind them, are one row a task, summed over the tasks in a fixed order.
All in full precision, whatever PyTorch's own products have.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chain_kernel", "products_kernel", "sums_kernel"]


@triton.jit
def two(left, right, at, live_left, live_right, columns, D):
    """Blocks of both factors from column `at` on: [ROWS, 1, LANES] and [1, COLS, LANES]."""
    live = (at + columns < D)[None, None, :]
    f = tl.load(left + at, mask=live_left & live, other=0.0)
    return f, tl.load(right + at, mask=live_right & live, other=0.0)


# D is not specialised: loads of one number a lane leave every row of a block in each thread
@triton.jit(do_not_specialize=["S", "Q", "C", "D", "support_task", "query_task"])
def products_kernel(
    support,  # [T, S, D], tasks `support_task` elements apart
    query,  # [T, Q, D]
    weight,  # [C, D]
    products,  # [T, S + Q, S + C]
    S,
    Q,
    C,
    D,
    support_task,
    query_task,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # S + C, padded
    LANES: tl.constexpr,
):
    blocks = tl.cdiv(S + Q, ROWS)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLS)
    columns = tl.arange(0, LANES)
    support += t * support_task
    query += t * query_task
    left = tl.where(i < S, support + i * D, query + (i - S) * D)[:, None, None] + columns[None, None, :]
    right = tl.where(j < S, support + j * D, weight + (j - S) * D)[None, :, None] + columns[None, None, :]
    live_left = (i < S + Q)[:, None, None]
    live_right = (j < S + C)[None, :, None]
    total = tl.zeros([ROWS, COLS, LANES], TYPE)
    f, g = two(left, right, 0, live_left, live_right, columns, D)
    for first in range(LANES, D + LANES, LANES):  # the next block is on its way while this one is multiplied
        f_next, g_next = two(left, right, first, live_left, live_right, columns, D)
        total += f * g
        f, g = f_next, g_next
    at = products + t * (S + Q) * (S + C) + i[:, None] * (S + C) + j[None, :]
    tl.store(at, tl.sum(total, 2), mask=(i < S + Q)[:, None] & (j < S + C)[None, :])


@triton.jit
def add_to(rows, total, c: tl.constexpr, more):
    """Row c of total [CP, COLS] grows by more [COLS]."""
    return tl.where((rows == c)[:, None], total + more[None, :], total)


@triton.jit
def row_of(rows, block, c: tl.constexpr):
    """Row c of a block [CP, COLS]."""
    return tl.sum(tl.where((rows == c)[:, None], block, 0.0), 0)


@triton.jit(do_not_specialize=["S", "Q", "D", "support_task", "query_task", "carry_size", "shares_size", "rest_size"])
def chain_kernel(
    support,  # [T, S, D], tasks `support_task` elements apart
    query,  # [T, Q, D]
    weight,  # [C, D]
    carry,  # [T, carry_size], as `head_kernel` writes it
    scale,  # [T]: what the carry is multiplied by
    dsupport,  # [T, S, D]
    dquery,  # [T, Q, D]
    shares,  # [T, shares_size]: of dW [C, D], then `rest_size` elements of dbias and the rates
    S,
    Q,
    D,
    support_task,
    query_task,
    carry_size,
    shares_size,
    rest_size,
    C: tl.constexpr,
    TYPE: tl.constexpr,
    SCALED: tl.constexpr,
    OF_SUPPORT: tl.constexpr,  # which gradients are asked for
    OF_QUERY: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    SP: tl.constexpr,
    CP: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,  # query samples at a time
    REST: tl.constexpr,  # rest_size, padded
):
    blocks = tl.cdiv(D, COLS)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * COLS
    columns = first + tl.arange(0, COLS)
    live = columns < D
    width = S + 2 * C
    carry += t * carry_size
    dq_at = carry + S * width
    u_at = dq_at + Q * C
    seed = tl.full([], 1.0, TYPE)
    if SCALED:
        seed = tl.load(scale + t)
    shares += t * shares_size
    if (first == 0) & (rest_size > 0):
        rest = tl.arange(0, REST)
        values = tl.load(u_at + C + rest, mask=rest < rest_size, other=0.0)
        tl.store(shares + (shares_size - rest_size) + rest, seed * values, mask=rest < rest_size)
    support += t * support_task + columns
    query += t * query_task + columns
    classes = tl.arange(0, CP)
    own = tl.zeros([CP, COLS], TYPE)
    share = tl.zeros([CP, COLS], TYPE)
    for s in range(S):
        f = tl.load(support + s * D, mask=live, other=0.0)
        for c in tl.static_range(C):
            own = add_to(classes, own, c, tl.load(carry + s * width + S + C + c) * f)
            if OF_WEIGHT:
                share = add_to(classes, share, c, tl.load(carry + s * width + S + c) * f)
    p = tl.zeros([CP, COLS], TYPE)
    for c in tl.static_range(C):
        own = add_to(classes, own, c, tl.load(u_at + c) * tl.load(weight + c * D + columns, mask=live, other=0.0))
    for q in range(0, Q, BLOCK):
        i = q + tl.arange(0, BLOCK)
        inside = (i < Q)[:, None] & live[None, :]
        x = tl.zeros([BLOCK, COLS], TYPE)
        if OF_SUPPORT or OF_WEIGHT:
            x = tl.load(query + i[:, None] * D, mask=inside, other=0.0)
        d = tl.zeros([BLOCK, COLS], TYPE)
        for c in tl.static_range(C):
            dq = tl.load(dq_at + i * C + c, mask=i < Q, other=0.0)[:, None]
            p = add_to(classes, p, c, tl.sum(dq * x, 0))
            d += dq * row_of(classes, own, c)[None, :]
        if OF_QUERY:
            tl.store(dquery + (t * Q + i[:, None]) * D + columns[None, :], seed * d, mask=inside)
    if OF_WEIGHT:
        for c in tl.static_range(C):
            value = row_of(classes, share, c) + tl.load(u_at + c) * row_of(classes, p, c)
            tl.store(shares + c * D + columns, seed * value, mask=live)
    if OF_SUPPORT:
        i = tl.arange(0, SP)
        d = tl.zeros([SP, COLS], TYPE)
        for s in range(S):
            f = tl.load(support + s * D, mask=live, other=0.0)
            g = tl.load(carry + s * width + i, mask=i < S, other=0.0)  # of a symmetric matrix
            d += g[:, None] * f[None, :]
        for c in tl.static_range(C):
            w = tl.load(weight + c * D + columns, mask=live, other=0.0)
            d += tl.load(carry + i * width + S + c, mask=i < S, other=0.0)[:, None] * w[None, :]
            a = tl.load(carry + i * width + S + C + c, mask=i < S, other=0.0)
            d += a[:, None] * row_of(classes, p, c)[None, :]
        at = dsupport + (t * S + i[:, None]) * D + columns[None, :]
        tl.store(at, seed * d, mask=(i < S)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["tasks", "size", "of_weight", "classes"])
def sums_kernel(
    shares,  # [T, size]: of dW the first `of_weight`, then dbias [classes], then the rates' gradients
    dweight,
    dbias,
    drates,
    tasks,
    size,
    of_weight,
    classes,
    OF_BIAS: tl.constexpr,
    OF_RATES: tl.constexpr,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    j = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], TYPE)
    for first in range(0, tasks, ROWS):
        i = first + tl.arange(0, ROWS)
        live = (i < tasks)[:, None] & (j < size)[None, :]
        total += tl.sum(tl.load(shares + i[:, None].to(tl.int64) * size + j[None, :], mask=live, other=0.0), 0)
    small = j - of_weight
    tl.store(dweight + j, total, mask=small < 0)
    if OF_BIAS:
        tl.store(dbias + small, total, mask=(small >= 0) & (small < classes))
    if OF_RATES:
        tl.store(drates + (small - classes), total, mask=(small >= classes) & (j < size))
