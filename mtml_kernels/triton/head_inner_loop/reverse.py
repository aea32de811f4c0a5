"""The way back through the steps of a task of `head_inner_loop`; its head has the formulas."""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.triton.head_inner_loop.losses import curvature, weighted
from mtml_kernels.triton.head_inner_loop.steps import APART, SHARED
from mtml_kernels.triton.head_inner_loop.tiles import CHUNK, get, get_row, product, put, put_row, times

__all__ = ["gram_cotangent", "narrow_gram_cotangent", "reverse"]

SIDE = tl.constexpr(32)  # of a block of dgram


@triton.jit
def reverse(
    gram,
    gram_at,
    zs,
    bias,
    y,
    w,
    rates,
    history,
    grad_losses,
    drates,
    da,
    db,
    du,
    dv,
    dbias,
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
    HAS_GRAD_LOSSES: tl.constexpr,
    RATES: tl.constexpr,
    ON_CHIP: tl.constexpr,
    SP: tl.constexpr,
    CP: tl.constexpr,
):
    """Back through the steps: dgram [SP, SP], dzs [SP, CP], dbias [CP]. The rates' gradients go to `drates`, where
    anybody asks for them.

    Where it does not fit on chip, or the classes are fewer than a product is deep, dgram is made afterwards, of the dz
    that replace p in the history.
    """
    AT_ONCE: tl.constexpr = ON_CHIP and CP >= CHUNK
    GROUPS: tl.constexpr = 2 if SHIFT == APART else 1
    ONES: tl.constexpr = 1.0 if SHIFT == SHARED else 0.0
    plane = S * C
    dgram = tl.zeros([SP, SP] if AT_ONCE else [1, 1], TYPE)
    dzs = tl.zeros([SP, CP], TYPE)
    u = tl.full([CP], 1.0, TYPE)
    v = tl.full([CP], 1.0, TYPE)
    for back in range(K):
        k = K - 1 - back
        at = history + k * ((1 + GROUPS) * plane + GROUPS * C)
        p = get(at, 0, S, C, C, SP, CP)
        a = get(at + plane, 0, S, C, C, SP, CP)
        r = weighted(w, p - y)
        alpha = get_row(rates + k * C, C, CP)
        x = alpha[None, :] * da
        if RATES:
            dalpha = tl.sum(da * (r - m * a), 0)
        kept = 1.0 - alpha * m
        da = kept[None, :] * da
        if DECAYS:
            u = get_row(at + (1 + GROUPS) * plane, C, CP)
            if RATES:
                dalpha += du * (proximal - m * u)
            du = kept * du
        if RATES:
            put_row(drates + k * C, dalpha, C, CP)
        if SHIFT == APART:
            b = get(at + 2 * plane, 0, S, C, C, SP, CP)
            beta = get_row(rates + (K + k) * C, C, CP)
            x += beta[None, :] * db
            if RATES:
                dbeta = tl.sum(db * (r - m * b), 0)
            kept_b = 1.0 - beta * m
            db = kept_b[None, :] * db
            if DECAYS:
                v = get_row(at + 3 * plane + C, C, CP)
                if RATES:
                    dbeta += dv * (proximal - m * v)
                dv = kept_b * dv
            if RATES:
                put_row(drates + (K + k) * C, dbeta, C, CP)
        dz = weighted(w, curvature(p, x, KIND))
        if HAS_GRAD_LOSSES:
            dz += tl.load(grad_losses + k * tasks + t) * r
        dzs += u[None, :] * dz
        if DECAYS:
            du += tl.sum(dz * zs, 0)
        if SHIFT == APART:
            down = tl.sum(dz, 0)
            db -= down[None, :]
            dv += bias * down
            dbias += v * down
        if not AT_ONCE:
            tl.debug_barrier()  # all have read p
            put(at, dz, 0, S, C, C, SP, CP)
        da -= times(gram, gram_at, 0, S, wide, dz, at, S, C, ONES, TYPE, ON_CHIP, SP, CP)
        if AT_ONCE:
            dgram -= product(dz, tl.trans(a), TYPE)
    if SHIFT == SHARED:
        dbias += tl.sum(dzs, 0)
    return dgram, dzs, dbias


@triton.jit
def gram_cotangent(history, at, stride, S, C, K, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """dgram + dgram^T to rows `at` of `stride` elements, block by block, of every step's dz and a in the history."""
    plane = S * C
    tl.debug_barrier()  # other threads wrote what this one reads
    for i in range(0, S, SIDE):
        for j in range(0, S, SIDE):
            block = tl.zeros([SIDE, SIDE], TYPE)
            for k in range(1, K):  # a is 0 in step 0
                dz = history + k * ((1 + GROUPS) * plane + GROUPS * C)
                for c in range(0, C, CHUNK):
                    block -= outer(dz + c, dz + plane + c, i, j, S, C, C - c, TYPE)
                    block -= outer(dz + plane + c, dz + c, i, j, S, C, C - c, TYPE)
            put(at + j, block, i, S, S - j, stride, SIDE, SIDE)


@triton.jit
def narrow_gram_cotangent(history, S, C, K, GROUPS: tl.constexpr, TYPE: tl.constexpr, SP: tl.constexpr):
    """dgram [SP, SP] of every step's dz and a in the history: one product over the classes of all steps."""
    plane = S * C
    step = (1 + GROUPS) * plane + GROUPS * C
    tl.debug_barrier()  # other threads wrote what this one reads
    i = tl.arange(0, SP)[:, None]
    total = tl.zeros([SP, SP], TYPE)
    for first in range(C, K * C, CHUNK):  # a is 0 in step 0
        j = first + tl.arange(0, CHUNK)
        at = history + (j // C * step + j % C)[None, :] + i * C
        live = (i < S) & (j < K * C)[None, :]
        dz = tl.load(at, mask=live, other=0.0)
        total -= product(dz, tl.trans(tl.load(at + plane, mask=live, other=0.0)), TYPE)
    return total


@triton.jit
def outer(left, right, i, j, S, C, rest, TYPE: tl.constexpr):
    """left right^T of CHUNK columns, rest of which there are: rows i on of `left`, j on of `right`, [SIDE, SIDE]."""
    right_block = get(right, j, S, rest, C, SIDE, CHUNK)
    return product(get(left, i, S, rest, C, SIDE, CHUNK), tl.trans(right_block), TYPE)
