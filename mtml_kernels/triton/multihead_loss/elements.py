"""A block of elements of a head without softmax: loss and gradient of bce_with_logits, mse, l1, huber, gaussian_nll.

Element with logit z and target y of sample i, d = z - y, factor a = s_i share / norm (share 1 / E, "sum": 1):
    bce_with_logits  l = (1 - y) softplus(z) + r y softplus(-z)    dz = (1 - y) sigmoid(z) - r y sigmoid(-z)
    mse              l = d^2                                       dz = 2 d
    l1               l = |d|                                       dz = sign d
    huber            l = d^2 / 2, |d| < delta;                     dz = d
                         delta (|d| - delta / 2) beyond                 delta sign d
    gaussian_nll     l = (w + d^2 exp(-w)) / 2, mean z             dz = d exp(-w), dw = (1 - d^2 exp(-w)) / 2
with r the positive weight and softplus(z) = max(z, 0) + log1p(exp(-|z|)): no difference of near numbers at any z.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import HEAD_KINDS as KINDS
from mtml_kernels.triton.multihead_loss.rows import split
from mtml_kernels.triton.multihead_loss.table import word
from mtml_kernels.triton.pointwise import log1p

__all__ = ["element_tile"]

BCE = tl.constexpr(KINDS.index("bce_with_logits"))
MSE = tl.constexpr(KINDS.index("mse"))
L1 = tl.constexpr(KINDS.index("l1"))
GAUSSIAN_NLL = tl.constexpr(KINDS.index("gaussian_nll"))
LOGITS = word("logits")
GRAD = word("grad")
TARGET = word("target")
SAMPLE_WEIGHTS = word("sample_weights")
WEIGHTS = word("weights")
KIND = word("kind")
ROWS = word("rows")
CLASSES = word("classes")
INNER = word("inner")
DELTA = word("delta")
SHARE = word("share")


@triton.jit
def element_tile(head, options, block, scale, TYPE: tl.constexpr, BLOCK: tl.constexpr, WANT_GRAD: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    first = block * BLOCK
    at = first + lanes
    elements = tl.load(head + ROWS)
    live = at < elements
    sample, place = split(first, lanes, tl.load(head + INNER))
    s_at = tl.load(head + SAMPLE_WEIGHTS)
    s = tl.load(s_at.to(tl.pointer_type(tl.float32)) + sample, mask=at < tl.where(s_at == 0, 0, elements), other=1.0)
    a = tl.where(s == 0, 0.0, s * (scale * tl.load(options + SHARE).to(tl.float32)))
    y = tl.load(tl.load(head + TARGET).to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
    z_at = tl.load(head + LOGITS).to(tl.pointer_type(TYPE))
    dz_at = tl.load(head + GRAD).to(tl.pointer_type(TYPE))
    kind = tl.load(head + KIND)
    if kind == GAUSSIAN_NLL:
        outputs = tl.load(head + CLASSES)
        pair, output = split(first, lanes, outputs)
        mean_at = pair * 2 * outputs + output
        d = tl.load(z_at + mean_at, mask=live, other=0.0).to(tl.float32) - y
        w = tl.load(z_at + mean_at + outputs, mask=live, other=0.0).to(tl.float32)
        precision = tl.exp(-w)
        losses = 0.5 * (w + d * d * precision)
        if WANT_GRAD:
            _store(dz_at + mean_at, a, d * precision, live, TYPE)
            _store(dz_at + mean_at + outputs, a, 0.5 * (1.0 - d * d * precision), live, TYPE)
    else:
        z = tl.load(z_at + at, mask=live, other=0.0).to(tl.float32)
        if kind == BCE:
            r_at = tl.load(head + WEIGHTS)
            limit = tl.where(r_at == 0, 0, elements)
            r = tl.load(r_at.to(tl.pointer_type(tl.float32)) + place, mask=at < limit, other=1.0)
            losses, dz = _bce(z, 1.0 - y, r * y)
        else:
            losses, dz = _distance(z - y, kind, tl.load(options + DELTA).to(tl.float32))
        if WANT_GRAD:
            _store(dz_at + at, a, dz, live, TYPE)
    return tl.sum(tl.where(live & (a != 0), a * losses, 0.0), 0)


@triton.jit
def _store(at, a, slope, live, TYPE: tl.constexpr):
    tl.store(at, tl.where(a == 0, 0.0, a * slope).to(TYPE), mask=live)


@triton.jit
def _bce(z, off, on):
    u = tl.exp(-tl.abs(z))
    v = 1.0 + u
    tail = log1p(u)
    losses = off * (tail + tl.where(z > 0.0, z, 0.0)) + on * (tail + tl.where(z < 0.0, -z, 0.0))
    small, large = u / v, 1.0 / v  # the sigmoids of -|z| and |z|
    return losses, off * tl.where(z < 0.0, small, large) - on * tl.where(z < 0.0, large, small)


@triton.jit
def _distance(d, kind, delta):
    far = tl.abs(d)
    sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))  # NaN stays NaN
    if kind == MSE:
        losses = d * d
        slope = 2.0 * d
    elif kind == L1:
        losses = far
        slope = sign
    else:
        losses = tl.where(far < delta, 0.5 * d * d, delta * (far - 0.5 * delta))
        slope = tl.where(far < delta, d, delta * sign)
    return losses, slope
