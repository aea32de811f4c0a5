"""The kernel of `head_inner_loop`: one program a task, from the products of its features to their cotangents."""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import KINDS
from mtml_kernels.triton.head_inner_loop.losses import scale_of, targets
from mtml_kernels.triton.head_inner_loop.reverse import gram_cotangent, narrow_gram_cotangent, reverse
from mtml_kernels.triton.head_inner_loop.steps import APART, NONE, SHARED, adapt, judge
from mtml_kernels.triton.head_inner_loop.tiles import (
    CHUNK,
    get,
    get_row,
    get_transposed,
    number,
    put,
    put_row,
    put_transposed,
)

__all__ = ["head_kernel"]

IDS = tl.constexpr(KINDS.index("cross_entropy"))


SIZES = ["tasks", "S", "Q", "C", "K", "carry_size"]
STRIDES = ["gram_task", "zs_task", "cross_task", "zq_task", "wide", "narrow"]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def head_kernel(
    gram,  # [T, S, S], tasks `gram_task` elements apart, rows `wide`, as those of cross
    zs,  # [T, S, C], rows `narrow` elements apart, as those of zq
    cross,  # [T, Q, S]
    zq,  # [T, Q, C]
    bias,  # [C]
    rates,  # [1 or 2, K, C]
    labels,  # [T, S] or [T, S, C]
    query_labels,  # [T, Q] or [T, Q, C]
    support_mask,  # [T, S]
    query_mask,  # [T, Q]
    grad_loss,  # [T]
    grad_logits,  # [T, Q, C]
    grad_losses,  # [K, T]
    grad_coefficients,  # [T, 1 or 2, C, S]
    loss,  # [T]
    logits,  # [T, Q, C]
    losses,  # [K, T]
    coefficients,  # [T, 1 or 2, C, S]
    history,  # [T, K + 1, (2 or 3) S C + (1 or 2) C]: p, a, b, u, v of every step; nobody else reads it
    carry,  # [T, carry_size]: [dgram + dgram^T, dzs, -a] [S, S + 2 C], dq [Q, C], u, dbias [C], drates [1 or 2, K, C]
    tasks,
    S,
    Q,
    C,
    K,
    carry_size,
    gram_task,
    zs_task,
    cross_task,
    zq_task,
    wide,
    narrow,
    smoothing,  # label smoothing; each number with what float32 leaves of it
    smoothing_low,
    query_smoothing,
    query_smoothing_low,
    decay,
    decay_low,
    proximal,
    proximal_low,
    TYPE: tl.constexpr,
    KIND: tl.constexpr,  # of the support loss: place in losses.KINDS
    MEAN: tl.constexpr,
    MASKED: tl.constexpr,
    QUERY_KIND: tl.constexpr,
    QUERY_MEAN: tl.constexpr,
    QUERY_MASKED: tl.constexpr,
    TARGETS: tl.constexpr,  # there are query labels
    SHIFT: tl.constexpr,
    DECAYS: tl.constexpr,  # decay != 0
    OUTPUTS: tl.constexpr,  # write the results
    CARRY: tl.constexpr,  # go back, and write the carry
    OWN_LOSS: tl.constexpr,  # no cotangent is given: the loss has 1
    HAS_GRAD_LOSS: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    HAS_GRAD_LOSSES: tl.constexpr,
    HAS_GRAD_COEFFICIENTS: tl.constexpr,
    RATES: tl.constexpr,  # their gradients are asked for; else nobody reads that part of the carry
    ON_CHIP: tl.constexpr,  # gram stays in registers, else it is read from memory, a few columns at a time
    SP: tl.constexpr,  # S and C padded
    CP: tl.constexpr,
    BLOCK: tl.constexpr,  # query samples at a time
):
    t = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = 2 if SHIFT == APART else 1
    plane = S * C
    labels += t * (S if KIND == IDS else plane)
    query_labels += t * (Q if QUERY_KIND == IDS else Q * C)
    support_mask += t * S
    query_mask += t * Q
    coefficients += t * GROUPS * plane
    gram += t * gram_task
    step = (1 + GROUPS) * plane + GROUPS * C
    history += t * (K + 1) * step
    smoothing = number(smoothing, smoothing_low, TYPE)
    query_smoothing = number(query_smoothing, query_smoothing_low, TYPE)
    proximal = number(proximal, proximal_low, TYPE)
    m = number(decay, decay_low, TYPE) + proximal

    g = tl.zeros([1, 1], TYPE)
    if ON_CHIP:
        g = get(gram, 0, S, S, wide, SP, SP) + (1.0 if SHIFT == SHARED else 0.0)  # padding meets rows of 0
    z = get(zs + t * zs_task, 0, S, C, narrow, SP, CP)
    shift = tl.zeros([CP], TYPE)
    if SHIFT != NONE:
        shift = get_row(bias, C, CP)
    if SHIFT == SHARED:
        z += shift[None, :]
    scale = scale_of(labels, support_mask, S, C, KIND, MEAN, MASKED, SP, TYPE)
    y, w = targets(labels, support_mask, tl.arange(0, SP), S, C, smoothing, scale, KIND, MASKED, CP, TYPE)
    a, b, u, v = adapt(
        g, gram, z, shift, y, w, rates, losses, history, t, tasks, S, C, K, wide, m, proximal,
        TYPE, KIND, SHIFT, DECAYS, OUTPUTS, CARRY, ON_CHIP, SP, CP,
    )  # fmt: skip

    da = tl.zeros([SP, CP], TYPE)
    db = tl.zeros([SP, CP], TYPE)
    if HAS_GRAD_COEFFICIENTS:
        outer = grad_coefficients + t * GROUPS * plane
        da = get_transposed(outer, C, S, CP, SP)
        if SHIFT == APART:
            db = get_transposed(outer + plane, C, S, CP, SP)
    seed = tl.full([], 1.0 if OWN_LOSS else 0.0, TYPE)
    if HAS_GRAD_LOSS:
        seed = tl.load(grad_loss + t)
    carry += t * carry_size
    dq = carry + S * (S + 2 * C)
    total, da, db, du, dv, dbias = judge(
        cross + t * cross_task, zq + t * zq_task, shift, query_labels, query_mask, logits + t * Q * C,
        grad_logits + t * Q * C, dq, a, history + K * step + plane, b, u, v, da, db, seed, query_smoothing,
        S, Q, C, wide, narrow, TYPE, QUERY_KIND, QUERY_MEAN, QUERY_MASKED, TARGETS, SHIFT, OUTPUTS, CARRY,
        HAS_GRAD_LOGITS, ON_CHIP, SP, CP, BLOCK,
    )  # fmt: skip
    if OUTPUTS:
        put_transposed(coefficients, a, C, S, CP, SP)
        if SHIFT == APART:
            put_transposed(coefficients + plane, b, C, S, CP, SP)
        if TARGETS:
            tl.store(loss + t + tl.arange(0, 1), total)

    if CARRY:
        width = S + 2 * C
        put(carry + S + C, -a, 0, S, C, width, SP, CP)
        rest = dq + Q * C
        put_row(rest, u, C, CP)
        tl.debug_barrier()  # a thread may read what another wrote to the history
        dgram, dzs, dbias = reverse(
            g, gram, z, shift, y, w, rates, history, grad_losses, rest + 2 * C, da, db, du, dv, dbias,
            t, tasks, S, C, K, wide, m, proximal, TYPE, KIND, SHIFT, DECAYS, HAS_GRAD_LOSSES, RATES, ON_CHIP, SP, CP,
        )  # fmt: skip
        if ON_CHIP and CP < CHUNK:
            dgram = narrow_gram_cotangent(history, S, C, K, GROUPS, TYPE, SP)
        if ON_CHIP:
            put(carry, dgram + tl.trans(dgram), 0, S, S, width, SP, SP)
        else:
            gram_cotangent(history, carry, width, S, C, K, GROUPS, TYPE)
        put(carry + S, dzs, 0, S, C, width, SP, CP)
        put_row(rest + C, dbias, C, CP)
