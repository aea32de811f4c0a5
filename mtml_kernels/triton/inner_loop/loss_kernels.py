"""Kernels of the losses of the inner loop, a row of E elements or classes a sample; several samples a program.

MODE        row [T, N]                          grad [T, N, E], times f = c (over E where the mean is taken)
  FORWARD   l                                   dl/dz
  TANGENT                                       d2l zt + seed dl/dz
  DATA      seed l + <dl/dz, zt>                d2l/dydz zt + seed dl/dy

      l                              dl/dz               d2l zt                  dl/dy            d2l/dydz zt
    mse  (z - y)^2                   2 (z - y)           2 zt                    -dl/dz           -d2l zt
    bce  log(1 + e^z) - z y          s - y               s (1 - s) zt            -z               -zt
    huber  h(z - y)                  clamp(z - y, p0)    [|z - y| < p0] zt       -dl/dz           -d2l zt
    l1   |z - y|                     sign(z - y)         0                       -dl/dz           0
    ce   -<t, log p>                 m p - t             m p (zt - <p, zt>)     (p0 - 1) log p   (1 - p0) (<p, zt> - zt)

with s = sigmoid(z), p = softmax(z), t = (1 - p0) y + p0 / C for y one-hot of class ids or probabilities, m = sum t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import IGNORED, KINDS
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.pointwise import log1p

__all__ = ["DATA", "FORWARD", "TANGENT", "class_kernel", "class_tile", "element_kernel", "element_tile"]

FORWARD, TANGENT, DATA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MSE, BCE = tl.constexpr(KINDS.index("mse")), tl.constexpr(KINDS.index("bce_with_logits"))
HUBER = tl.constexpr(KINDS.index("huber"))
IGNORE = tl.constexpr(IGNORED)


@triton.jit
def _sigmoid(z):
    u = tl.exp(-tl.abs(z))
    return tl.where(z < 0, u, 1.0) / (1.0 + u)


@triton.jit
def _first_order(z, y, KIND: tl.constexpr, P0: tl.constexpr):
    """l and dl/dz"""
    off = z - y
    if KIND == MSE:
        value, slope = off * off, off * 2.0
    elif KIND == BCE:
        tail = log1p(tl.exp(-tl.abs(z)))
        value = (1.0 - y) * (tail + tl.where(z > 0, z, 0.0)) + y * (tail + tl.where(z < 0, -z, 0.0))
        slope = _sigmoid(z) - y
    elif KIND == HUBER:
        delta = tl.full(z.shape, P0, z.dtype)
        far = tl.abs(off)
        value = tl.where(far < delta, off * off * 0.5, delta * (far - delta * 0.5))
        slope = tl.where(off < -delta, -delta, tl.where(off > delta, delta, off))  # NaN stays
    else:
        value = tl.abs(off)
        slope = tl.where(off > 0, 1.0, tl.where(off < 0, -1.0, 0.0)).to(z.dtype)
    return value, slope


@triton.jit
def _second_order(z, y, zt, KIND: tl.constexpr, P0: tl.constexpr):
    """d2l zt"""
    if KIND == MSE:
        bend = zt * 2.0
    elif KIND == BCE:
        s = _sigmoid(z)
        bend = s * (1.0 - s) * zt
    elif KIND == HUBER:
        bend = tl.where(tl.abs(z - y) < tl.full(z.shape, P0, z.dtype), zt, 0.0)
    else:
        bend = tl.zeros(z.shape, z.dtype)
    return bend


@triton.jit
def _factor(c, n, N, c_n, seed, HAS_C: tl.constexpr, HAS_SEED: tl.constexpr, TOTAL: tl.constexpr, TYPE: tl.constexpr):
    """What every sample counts for in its task's loss, and the task's seed."""
    f = (n < N).to(TYPE)
    if HAS_C:
        f = tl.load(c + n * c_n, mask=n < N, other=0.0).to(TYPE)
    elif not TOTAL:
        f = f / N
    s = tl.full([], 0.0, TYPE)
    if HAS_SEED:
        s = tl.load(seed).to(TYPE)
    return f, s


@triton.jit
def _element_terms(
    z, zt, y, seed, MODE: tl.constexpr, KIND: tl.constexpr, P0: tl.constexpr, HAS_ZT: tl.constexpr,
    HAS_SEED: tl.constexpr,
):  # fmt: skip
    """What a tile's elements add to `row` and, before its factor, `grad`."""
    value, slope = _first_order(z, y, KIND, P0)
    found = slope
    if MODE != FORWARD:
        found = tl.zeros(z.shape, z.dtype)
        along = tl.zeros(z.shape, z.dtype)
        if HAS_ZT:
            bend = zt if MODE == DATA and KIND == BCE else _second_order(z, y, zt, KIND, P0)
            found += bend
            along += slope * zt
        if HAS_SEED:
            found += seed * (z if MODE == DATA and KIND == BCE else slope)
            along += seed * value
        if MODE == DATA:
            found = -found
        value = along
    return value, found


@triton.jit
def element_tile(
    z, zt, y,  # [rows, E]
    f, seed, live,  # [rows, 1] or [rows, E]
    E: tl.constexpr, MODE: tl.constexpr, KIND: tl.constexpr, P0: tl.constexpr, TOTAL: tl.constexpr,
    HAS_ZT: tl.constexpr, HAS_SEED: tl.constexpr,
):  # fmt: skip
    """(row [rows, 1], grad) of samples that are whole in a tile."""
    value, found = _element_terms(z, zt, y, seed, MODE, KIND, P0, HAS_ZT, HAS_SEED)
    row = tl.sum(tl.where(live, value, 0.0), 1)[:, None]
    if not TOTAL:
        row = row / E
        f = f / E
    return row, f * found


@triton.jit
def element_kernel(
    z, zt, y,  # [T, N, E]
    c,  # [T, N]
    seed,  # [T]
    row,  # [T, N]
    grad,  # [T, N, E]
    N, E, z_t, z_n, z_e, zt_t, zt_n, zt_e, y_t, y_n, y_e, c_t, c_n, seed_t,
    MODE: tl.constexpr, KIND: tl.constexpr, P0: tl.constexpr, TOTAL: tl.constexpr,
    HAS_ZT: tl.constexpr, HAS_C: tl.constexpr, HAS_SEED: tl.constexpr, ROW: tl.constexpr, GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """mse, bce_with_logits, huber and l1: of a sample the mean over its elements, or TOTAL, the sum."""
    task, block = task_and_block(tl.cdiv(N, ROWS))
    n = block * ROWS + tl.arange(0, ROWS)
    f, own_seed = _factor(c + task * c_t, n, N, c_n, seed + task * seed_t, HAS_C, HAS_SEED, TOTAL, TYPE)
    if not TOTAL:
        f = f / E
    sample = n.to(tl.int64)[:, None]
    added = tl.zeros([ROWS], TYPE)
    for first in range(0, E, COLS):
        e = first + tl.arange(0, COLS)[None, :]
        live = (n < N)[:, None] & (e < E)
        of_z = tl.load(z + task * z_t + sample * z_n + e * z_e, mask=live, other=0.0).to(TYPE)
        of_y = tl.load(y + task * y_t + sample * y_n + e * y_e, mask=live, other=0.0).to(TYPE)
        moved = of_z
        if HAS_ZT:
            moved = tl.load(zt + task * zt_t + sample * zt_n + e * zt_e, mask=live, other=0.0).to(TYPE)
        value, found = _element_terms(of_z, moved, of_y, own_seed, MODE, KIND, P0, HAS_ZT, HAS_SEED)
        added += tl.sum(tl.where(live, value, 0.0), 1)
        if GRAD:
            tl.store(grad + (task * N + sample) * E + e, f[:, None] * found, mask=live)
    if ROW:
        if not TOTAL:
            added = added / E
        tl.store(row + task * N + n, added, mask=n < N)


@triton.jit
def _targets(y, label, j, C, live, HARD: tl.constexpr, P0: tl.constexpr, TYPE: tl.constexpr):
    """t of a tile: of class ids, or of the probabilities at y."""
    t = (j == label).to(TYPE) if HARD else tl.load(y, mask=live, other=0.0).to(TYPE)
    if P0 != 0:
        t = t * (1.0 - P0) + tl.full([], P0, TYPE) / C
    return tl.where(live, t, 0.0)


@triton.jit
def _class_terms(
    logit, log_total, share, mean, t, mass, zt, seed, live,
    MODE: tl.constexpr, HARD: tl.constexpr, P0: tl.constexpr, HAS_ZT: tl.constexpr, HAS_SEED: tl.constexpr,
):  # fmt: skip
    """What a tile's classes add to `row` and, before its factor, `grad`, with share = 1 / sum exp z, mean = <p, zt>."""
    p, log_p = tl.exp(logit) * share, logit - log_total
    meant = (t != 0) if HARD else live  # a class of logit -inf that is not meant adds nothing
    value = tl.where(meant, -t * log_p, 0.0)
    slope = p * mass - t
    found = slope
    if MODE != FORWARD:
        found = tl.zeros(logit.shape, logit.dtype)
        along = tl.zeros(logit.shape, logit.dtype)
        if HAS_ZT:
            found += (1.0 - P0) * (mean - zt) if MODE == DATA else mass * p * (zt - mean)
            along += slope * zt
        if HAS_SEED:
            found += seed * ((P0 - 1.0) * log_p if MODE == DATA else slope)
            along += seed * value
        value = along
    return value, found


@triton.jit
def class_tile(
    z, zt,  # [rows, C]
    y,  # [rows, 1] ids, or [rows, C] probabilities
    f, seed, live,  # [rows, 1] or [rows, C]
    j,  # [1, C]
    C: tl.constexpr, MODE: tl.constexpr, HARD: tl.constexpr, P0: tl.constexpr, HAS_ZT: tl.constexpr,
    HAS_SEED: tl.constexpr,
):  # fmt: skip
    """(row [rows, 1], grad) of samples that are whole in a tile: `class_kernel` in one pass."""
    logit = tl.where(live, z, float("-inf"))
    top = tl.max(logit, 1)[:, None]
    logit = logit - tl.where(top == float("-inf"), 0.0, top)
    each = tl.exp(logit)
    total = tl.sum(each, 1)[:, None]
    mean = tl.sum(tl.where(live, each * zt, 0.0), 1)[:, None] / total
    t = (j == tl.where(y == IGNORE, 0, y)).to(z.dtype) if HARD else y
    if P0 != 0:
        t = t * (1.0 - P0) + tl.full([], P0, z.dtype) / C
    t = tl.where(live, t, 0.0)
    mass = tl.sum(t, 1)[:, None]
    if HARD:
        bad = (y != IGNORE) & ((y < 0) | (y >= C))
        mass = tl.where(bad, float("nan"), 1.0).to(z.dtype)
        f = tl.where(bad, float("nan"), f)
    value, found = _class_terms(
        logit, tl.log(total), 1.0 / total, mean, t, mass, zt, seed, live, MODE, HARD, P0, HAS_ZT, HAS_SEED
    )
    row = tl.sum(tl.where(live, value, 0.0), 1)[:, None]
    return row * tl.where(mass == mass, 1.0, mass), f * found


@triton.jit
def class_kernel(
    z, zt,  # [T, N, C]
    y,  # [T, N] ids, or [T, N, C] probabilities
    c,  # [T, N]
    seed,  # [T]
    row,  # [T, N]
    grad,  # [T, N, C]
    N, C, z_t, z_n, z_e, zt_t, zt_n, zt_e, y_t, y_n, y_e, c_t, c_n, seed_t,
    MODE: tl.constexpr, HARD: tl.constexpr, P0: tl.constexpr, TOTAL: tl.constexpr,
    HAS_ZT: tl.constexpr, HAS_C: tl.constexpr, HAS_SEED: tl.constexpr, ROW: tl.constexpr, GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Cross-entropy: a first pass over the classes finds the largest z, the sums of exponentials (also times zt) and of
    t; a second one the results. An ignored id, whose c is 0, counts as class 0; one out of range makes NaN.
    """
    task, block = task_and_block(tl.cdiv(N, ROWS))
    n = block * ROWS + tl.arange(0, ROWS)
    f, own_seed = _factor(c + task * c_t, n, N, c_n, seed + task * seed_t, HAS_C, HAS_SEED, TOTAL, TYPE)
    sample = n.to(tl.int64)[:, None]
    z_at, zt_at, y_at = z + task * z_t + sample * z_n, zt + task * zt_t + sample * zt_n, y + task * y_t + sample * y_n
    label = sample * 0
    if HARD:
        given = tl.load(y_at, mask=(n < N)[:, None], other=0).to(tl.int64)
        label = tl.where(given == IGNORE, 0, given)
    top = tl.full([ROWS], float("-inf"), TYPE)
    total, along, mass = tl.zeros([ROWS], TYPE), tl.zeros([ROWS], TYPE), tl.zeros([ROWS], TYPE)
    for first in range(0, C, COLS):
        j = first + tl.arange(0, COLS)[None, :]
        live = (n < N)[:, None] & (j < C)
        logit = tl.load(z_at + j * z_e, mask=live, other=float("-inf")).to(TYPE)
        above = tl.maximum(top, tl.max(logit, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # a tile of -inf alone must not make NaN
        each = tl.exp(logit - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(each, 1)
        if HAS_ZT:
            moved = tl.load(zt_at + j * zt_e, mask=live, other=0.0).to(TYPE)
            along = along * shrink + tl.sum(each * moved, 1)
        if not HARD:
            mass += tl.sum(_targets(y_at + j * y_e, label, j, C, live, HARD, P0, TYPE), 1)
        top = above
    shift = tl.where(top == float("-inf"), 0.0, top)[:, None]
    log_total, share, mean = tl.log(total)[:, None], (1.0 / total)[:, None], (along / total)[:, None]
    if HARD:
        bad = (label < 0) | (label >= C)
        f = tl.where(tl.sum(bad.to(tl.int32), 1) > 0, float("nan"), f)
        mass = tl.where(tl.sum(bad.to(tl.int32), 1) > 0, float("nan"), 1.0).to(TYPE)
    added = tl.zeros([ROWS], TYPE)
    for first in range(0, C, COLS):
        j = first + tl.arange(0, COLS)[None, :]
        live = (n < N)[:, None] & (j < C)
        logit = tl.load(z_at + j * z_e, mask=live, other=float("-inf")).to(TYPE) - shift
        t = _targets(y_at + j * y_e, label, j, C, live, HARD, P0, TYPE)
        moved = t
        if HAS_ZT:
            moved = tl.load(zt_at + j * zt_e, mask=live, other=0.0).to(TYPE)
        value, found = _class_terms(
            logit, log_total, share, mean, t, mass[:, None], moved, own_seed, live, MODE, HARD, P0, HAS_ZT, HAS_SEED
        )
        added += tl.sum(tl.where(live, value, 0.0), 1)
        if GRAD:
            tl.store(grad + (task * N + sample) * C + j, f[:, None] * found, mask=live)
    if ROW:
        tl.store(row + task * N + n, added * tl.where(mass == mass, 1.0, mass), mask=n < N)
