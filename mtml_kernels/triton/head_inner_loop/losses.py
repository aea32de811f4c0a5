"""The losses of a linear head on a block of samples [N, C]: targets, predictions, and the tangent of the residual.

With w a sample's weight (its mask over the loss's norm, 0 where its label is ignored), y its target, p' x a tangent:
    cross_entropy     p = softmax(z)    l = log sum exp(z) - <y, z>                  p' x = p (x - <p, x>)
    bce_with_logits   p = sigmoid(z)    l = (1 - y) softplus(z) + y softplus(-z)     p' x = p (1 - p) x
    mse               p = z             l = (z - y)^2 / 2, its 2 stands in w         p' x = x
    L = sum w l;  dL/dz = w (p - y)
Columns beyond the last class have p = y = 0, rows beyond the last sample w = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import IGNORED, KINDS
from mtml_kernels.triton.pointwise import log1p

__all__ = ["curvature", "predictions", "scale_of", "targets", "weighted"]

CROSS_ENTROPY = tl.constexpr(KINDS.index("cross_entropy"))
MSE = tl.constexpr(KINDS.index("mse"))
IGNORE = tl.constexpr(IGNORED)


@triton.jit
def _counts(labels, mask, rows, samples, classes, KIND: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr):
    """How much each of `rows` counts: its mask, 0 where the label is ignored, NaN where there is no such class."""
    live = rows < samples
    count = live.to(TYPE)
    if MASKED:
        count = tl.load(mask + rows, mask=live, other=0.0)
    if KIND == CROSS_ENTROPY:
        label = tl.load(labels + rows, mask=live, other=IGNORE)
        count = tl.where((label >= 0) & (label < classes), count, tl.where(label == IGNORE, 0.0, float("nan")))
    return count


@triton.jit
def scale_of(
    labels,
    mask,
    samples,
    classes,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
):
    """What a count is multiplied by to be a weight: 1 / the sum of all counts, 0 where that is 0."""
    parts = tl.zeros([BLOCK], TYPE)
    if MEAN:
        for first in range(0, samples, BLOCK):
            parts += _counts(labels, mask, first + tl.arange(0, BLOCK), samples, classes, KIND, MASKED, TYPE)
    norm = tl.sum(parts, 0)
    if KIND != CROSS_ENTROPY:
        norm = norm * classes
    if not MEAN:
        norm = tl.full([], 1.0, TYPE)
    scale = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
    return scale * 2 if KIND == MSE else scale


@triton.jit
def targets(
    labels,
    mask,
    rows,
    samples,
    classes,
    smoothing,
    scale,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
):
    """y [rows, WIDTH] and w [rows]."""
    c = tl.arange(0, WIDTH)[None, :]
    live = (rows < samples)[:, None] & (c < classes)
    w = scale * _counts(labels, mask, rows, samples, classes, KIND, MASKED, TYPE)
    if KIND == CROSS_ENTROPY:
        label = tl.load(labels + rows, mask=rows < samples, other=IGNORE)[:, None]
        y = (1.0 - smoothing) * (label == c).to(TYPE) + smoothing / classes
        y = tl.where(live & (label != IGNORE), y, 0.0)
    else:
        y = tl.load(labels + rows[:, None] * classes + c, mask=live, other=0.0)
    return y, w


@triton.jit
def predictions(z, y, classes, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """p [N, WIDTH] and l [N]."""
    live = tl.arange(0, WIDTH)[None, :] < classes
    if KIND == CROSS_ENTROPY:
        d = z - tl.max(tl.where(live, z, float("-inf")), 1)[:, None]
        e = tl.where(live, tl.exp(tl.where(live, d, 0.0)), 0.0)
        total = tl.sum(e, 1)
        p = e / total[:, None]
        each = tl.log(total) - tl.sum(tl.where(y == 0, 0.0, y * d), 1)
    elif KIND == MSE:
        p = z
        each = tl.sum(0.5 * (z - y) * (z - y), 1)
    else:
        u = tl.exp(-tl.abs(z))
        tail = log1p(u)
        losses = (1.0 - y) * (tail + tl.where(z > 0.0, z, 0.0)) + y * (tail + tl.where(z < 0.0, -z, 0.0))
        p = tl.where(live, tl.where(z < 0.0, u, 1.0) / (1.0 + u), 0.0)
        each = tl.sum(tl.where(live, losses, 0.0), 1)
    return p, each


@triton.jit
def curvature(p, x, KIND: tl.constexpr):
    """The tangent of p along x; both [N, C]."""
    if KIND == CROSS_ENTROPY:
        tangent = p * (x - tl.sum(p * x, 1)[:, None])
    elif KIND == MSE:
        tangent = x
    else:
        tangent = p * (1.0 - p) * x
    return tangent


@triton.jit
def weighted(w, block):
    """w [N] times block [N, C], 0 where w is 0: what is masked out may be infinite."""
    return tl.where(w[:, None] == 0, 0.0, w[:, None] * block)
