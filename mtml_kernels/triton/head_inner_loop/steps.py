"""The way forward through a task of `head_inner_loop`: its steps and its query set. Formulas in that file.

All stands in one program's registers and shared memory; the variables are those of the formulas. What a flag leaves out
is a block of zeros that nothing reads, for a kernel has no None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.triton.head_inner_loop.losses import predictions, scale_of, targets, weighted
from mtml_kernels.triton.head_inner_loop.tiles import get, get_row, product, put, put_row, step_scale, times

__all__ = ["APART", "NONE", "SHARED", "adapt", "judge"]

NONE = tl.constexpr(0)
SHARED = tl.constexpr(1)
APART = tl.constexpr(2)


@triton.jit
def adapt(
    gram,
    gram_at,
    zs,
    bias,
    y,
    w,
    rates,
    losses,
    history,
    t,
    tasks,
    S,
    C,
    K,
    wide,
    m,
    proximal,
    TYPE: tl.constexpr,
    KIND: tl.constexpr,
    SHIFT: tl.constexpr,
    DECAYS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CARRY: tl.constexpr,
    ON_CHIP: tl.constexpr,
    SP: tl.constexpr,
    CP: tl.constexpr,
):
    """K steps: a, b [SP, CP] and u, v [CP] after them. Losses go out, and every step's state to `history`."""
    GROUPS: tl.constexpr = 2 if SHIFT == APART else 1
    ONES: tl.constexpr = 1.0 if SHIFT == SHARED else 0.0
    plane = S * C
    a = tl.zeros([SP, CP], TYPE)
    b = tl.zeros([SP, CP], TYPE)
    u = tl.full([CP], 1.0, TYPE)
    v = tl.full([CP], 1.0, TYPE)
    for k in range(K):
        if CARRY or not ON_CHIP:
            put(history + plane, a, 0, S, C, C, SP, CP)
        z = u[None, :] * zs
        z -= times(gram, gram_at, 0, S, wide, a, history + plane, S, C, ONES, TYPE, ON_CHIP, SP, CP)
        if SHIFT == APART:
            z += (v * bias - tl.sum(b, 0))[None, :]
        p, each = predictions(z, y, C, KIND, CP)
        if OUTPUTS:
            tl.store(losses + k * tasks + t, tl.sum(tl.where(w == 0, 0.0, w * each), 0))
        if CARRY:
            put(history, p, 0, S, C, C, SP, CP)
            if SHIFT == APART:
                put(history + 2 * plane, b, 0, S, C, C, SP, CP)
            if DECAYS:
                put_row(history + (1 + GROUPS) * plane, u, C, CP)
                if SHIFT == APART:
                    put_row(history + 3 * plane + C, v, C, CP)
        if CARRY or not ON_CHIP:
            history += (1 + GROUPS) * plane + GROUPS * C
        r = weighted(w, p - y)
        alpha = get_row(rates + k * C, C, CP)
        a = (1.0 - alpha * m)[None, :] * a + alpha[None, :] * r
        u = step_scale(u, alpha, m, proximal, DECAYS)
        if SHIFT == APART:
            beta = get_row(rates + (K + k) * C, C, CP)
            b = (1.0 - beta * m)[None, :] * b + beta[None, :] * r
            v = step_scale(v, beta, m, proximal, DECAYS)
    if SHIFT != APART:
        v = u
    if not ON_CHIP:
        put(history + plane, a, 0, S, C, C, SP, CP)
    return a, b, u, v


@triton.jit
def judge(
    cross,
    zq,
    bias,
    labels,
    mask,
    logits,
    grad_logits,
    dq_at,
    a,
    a_at,
    b,
    u,
    v,
    da,
    db,
    seed,
    smoothing,
    S,
    Q,
    C,
    wide,
    narrow,
    TYPE: tl.constexpr,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    MASKED: tl.constexpr,
    TARGETS: tl.constexpr,
    SHIFT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CARRY: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    ON_CHIP: tl.constexpr,
    SP: tl.constexpr,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The query set, BLOCK samples at a time: its loss, and da, db, du, dv, dbias of what it gives to the way back."""
    ONES: tl.constexpr = 1.0 if SHIFT == SHARED else 0.0
    total = tl.zeros([1], TYPE)
    du = tl.zeros([CP], TYPE)
    dv = tl.zeros([CP], TYPE)
    dbias = tl.zeros([CP], TYPE)
    scale = tl.full([], 0.0, TYPE)
    if TARGETS:
        scale = scale_of(labels, mask, Q, C, KIND, MEAN, MASKED, BLOCK, TYPE)
    for first in range(0, Q, BLOCK):
        h = get(cross, first, Q, S, wide, BLOCK, SP) + ONES
        z0 = get(zq, first, Q, C, narrow, BLOCK, CP)
        if SHIFT == SHARED:
            z0 += bias[None, :]
        z = u[None, :] * z0 - times(h, cross, first, Q, wide, a, a_at, S, C, ONES, TYPE, ON_CHIP, BLOCK, CP)
        if SHIFT == APART:
            z += (v * bias - tl.sum(b, 0))[None, :]
        if OUTPUTS:
            put(logits, z, first, Q, C, C, BLOCK, CP)
        dq = tl.zeros([BLOCK, CP], TYPE)
        if TARGETS:
            rows = first + tl.arange(0, BLOCK)
            y, w = targets(labels, mask, rows, Q, C, smoothing, scale, KIND, MASKED, CP, TYPE)
            p, each = predictions(z, y, C, KIND, CP)
            total += tl.sum(tl.where(w == 0, 0.0, w * each), 0)
            dq = weighted(seed * w, p - y)
        if CARRY:
            if HAS_GRAD_LOGITS:
                dq += get(grad_logits, first, Q, C, C, BLOCK, CP)
            put(dq_at, dq, first, Q, C, C, BLOCK, CP)
            da -= product(tl.trans(h), dq, TYPE)
            du += tl.sum(dq * z0, 0)
            down = tl.sum(dq, 0)
            dbias += v * down
            if SHIFT == APART:
                db -= down[None, :]
                dv += bias * down
    return total, da, db, du, dv, dbias
