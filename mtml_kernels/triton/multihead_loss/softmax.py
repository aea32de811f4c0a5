"""A tile of rows of a softmax head: loss and gradient of cross_entropy and kl.

Row i with logits z over C classes, target t (one-hot for a class id), smoothing e, class weights c, a = s_i / norm:
    q_j = c_j ((1 - e) t_j + e / C)          log p_j = (z_j - max z) - log sum_j exp(z_j - max z)
    loss_i = a sum_j (-q_j log p_j)          kl: e = 0, c = 1, and t_j log t_j is added (0 log 0 = 0)
    dz_j   = a (p_j sum_k q_k - q_j)
The first pass over the classes finds max z, the sum of exponentials and sum q, the second writes dz.

Where the target is a class id y, and nothing is smoothed or weighted by class, q is one-hot (`label_tile`):
    loss_i = a (log sum_j exp(z_j - max z) + max z - z_y)        dz_j = a (p_j - [j = y])
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.schema.losses import HEAD_KINDS as KINDS
from mtml_kernels.triton.multihead_loss.rows import label_rows
from mtml_kernels.triton.multihead_loss.table import word

__all__ = ["label_tile", "softmax_tile"]

KL = tl.constexpr(KINDS.index("kl"))
LOGITS = word("logits")
GRAD = word("grad")
TARGET = word("target")
WEIGHTS = word("weights")
KIND = word("kind")
HARD = word("hard")
SAMPLES = word("samples")
CLASSES = word("classes")
INNER = word("inner")
BAD_ROW = word("bad_row")
SMOOTHING = word("smoothing")


@triton.jit
def softmax_tile(
    head,
    options,
    block,
    scale,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr,  # 1: classes are neighbours in memory (I = 1); 0: pixels are
    ALIGNED: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    a, y, first, near = _factors(head, block, scale, ROWS, CLASS_AXIS)
    classes, step, start, live = _places(head, first, near, ROWS, CLASS_AXIS)
    # a tile's offsets fit 32 bits from the first of its elements on: half the registers of addresses
    wide = near * tl.load(head + CLASSES)
    z_at = tl.load(head + LOGITS).to(tl.pointer_type(TYPE)) + wide
    dz_at = tl.load(head + GRAD).to(tl.pointer_type(TYPE)) + wide
    t_at = tl.load(head + TARGET).to(tl.pointer_type(tl.float32)) + wide
    if ALIGNED:
        classes = tl.multiple_of(classes, 8)
        z_at, dz_at, t_at = tl.multiple_of(z_at, 16), tl.multiple_of(dz_at, 16), tl.multiple_of(t_at, 16)
    label = tl.expand_dims(y.to(tl.int32), CLASS_AXIS)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for c in range(0, classes, CHUNK):
        j = tl.expand_dims(c + tl.arange(0, CHUNK), 1 - CLASS_AXIS)
        inside = live & (j < classes)
        z = tl.load(z_at + start + j * step, mask=inside, other=float("-inf")).to(tl.float32)
        q, _ = _targets(head, options, t_at, start + j * step, j, label, classes, inside)
        above = tl.maximum(top, tl.max(z, CLASS_AXIS))
        shift = tl.where(above == float("-inf"), 0.0, above)  # a chunk of -inf alone must not give NaN
        each = tl.exp(z - tl.expand_dims(shift, CLASS_AXIS))
        total = total * tl.exp(top - shift) + tl.sum(each, CLASS_AXIS)
        mass += tl.sum(q, CLASS_AXIS)
        top = above

    shift = tl.expand_dims(tl.where(top == float("-inf"), 0.0, top), CLASS_AXIS)
    log_total = tl.expand_dims(tl.log(total), CLASS_AXIS)
    share = tl.expand_dims(1.0 / total, CLASS_AXIS)
    mass = tl.expand_dims(mass, CLASS_AXIS)
    factor = tl.expand_dims(a, CLASS_AXIS)
    kind = tl.load(head + KIND)
    losses = tl.zeros([ROWS], tl.float32)
    for c in range(0, classes, CHUNK):
        j = tl.expand_dims(c + tl.arange(0, CHUNK), 1 - CLASS_AXIS)
        inside = live & (j < classes)
        z = tl.load(z_at + start + j * step, mask=inside, other=float("-inf")).to(tl.float32) - shift
        q, t = _targets(head, options, t_at, start + j * step, j, label, classes, inside)
        each = tl.where(q == 0, 0.0, -q * (z - log_total))  # a class of logit -inf that nobody aims at adds nothing
        if kind == KL:
            each += tl.where(t == 0, 0.0, t * tl.log(tl.where(t == 0, 1.0, t)))
        losses += tl.sum(each, CLASS_AXIS)
        if WANT_GRAD:
            dz = tl.where(factor == 0, 0.0, factor * (tl.exp(z) * share * mass - q))
            tl.store(dz_at + start + j * step, dz.to(TYPE), mask=inside)
    # factor 0: ignored, of weight 0, or beyond the last row, where losses are NaN
    return tl.sum(tl.where(a == 0, 0.0, a * losses), 0)


@triton.jit
def label_tile(
    head,
    block,
    scale,
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    """`softmax_tile` of class ids alone: half of its instructions."""
    a, y, first, near = _factors(head, block, scale, ROWS, CLASS_AXIS)
    classes, step, start, live = _places(head, first, near, ROWS, CLASS_AXIS)
    wide = near * tl.load(head + CLASSES)
    z_at = tl.load(head + LOGITS).to(tl.pointer_type(TYPE)) + wide
    dz_at = tl.load(head + GRAD).to(tl.pointer_type(TYPE)) + wide
    if ALIGNED:
        classes = tl.multiple_of(classes, 8)
        z_at, dz_at = tl.multiple_of(z_at, 16), tl.multiple_of(dz_at, 16)
    label = tl.where((y >= 0) & (y < classes), y.to(tl.int32), -1)
    label = tl.expand_dims(label, CLASS_AXIS)
    own = tl.load(z_at + start + label * step, mask=live & (label >= 0), other=0.0).to(tl.float32)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for c in range(0, classes, CHUNK):
        j = tl.expand_dims(c + tl.arange(0, CHUNK), 1 - CLASS_AXIS)
        z = tl.load(z_at + start + j * step, mask=live & (j < classes), other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(z, CLASS_AXIS))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - tl.expand_dims(shift, CLASS_AXIS)), CLASS_AXIS)
        top = above

    shift = tl.where(top == float("-inf"), 0.0, top)
    losses = tl.log(total) + (shift - tl.sum(own, CLASS_AXIS))
    if WANT_GRAD:
        tl.debug_barrier()  # all have read the label's logit, over which its gradient may be written
        shift = tl.expand_dims(shift, CLASS_AXIS)
        factor = tl.expand_dims(a, CLASS_AXIS)
        share = tl.expand_dims(a / total, CLASS_AXIS)
        for c in range(0, classes, CHUNK):
            j = tl.expand_dims(c + tl.arange(0, CHUNK), 1 - CLASS_AXIS)
            inside = live & (j < classes)
            z = tl.load(z_at + start + j * step, mask=inside, other=float("-inf")).to(tl.float32)
            dz = tl.exp(z - shift) * share - tl.where(j == label, factor, 0.0)
            tl.store(dz_at + start + j * step, tl.where(factor == 0, 0.0, dz).to(TYPE), mask=inside)
    return tl.sum(tl.where(a == 0, 0.0, a * losses), 0)


@triton.jit
def _factors(head, block, scale, ROWS: tl.constexpr, CLASS_AXIS: tl.constexpr):
    """Factor a and label of every row, the first row, and the one whose offset the others' are counted from.

    A label out of range makes a NaN, and the head's first one goes to the table.
    """
    lanes = tl.arange(0, ROWS)
    first = block * ROWS
    s, y, counted, bad = label_rows(head, first, lanes)
    samples = tl.load(head + SAMPLES)
    bad_row = tl.min(tl.where(bad, first + lanes, samples), 0)
    if bad_row < samples:
        tl.atomic_min(head + BAD_ROW, bad_row)
    a = tl.where(bad, float("nan"), tl.where(counted & (s != 0), s * scale, 0.0))
    step = tl.load(head + INNER)
    near = first // step * step if CLASS_AXIS == 0 else first
    return a, y, first, near


@triton.jit
def _places(head, first, near, ROWS: tl.constexpr, CLASS_AXIS: tl.constexpr):
    """Classes, their distance, where each row begins, and whether it is there; from row `near` on, in 32 bits."""
    lanes = tl.arange(0, ROWS)
    classes = tl.load(head + CLASSES).to(tl.int32)
    step = tl.load(head + INNER).to(tl.int32)
    if CLASS_AXIS == 1:
        step = 1
        start = lanes * classes
    else:
        pixel = (first - near).to(tl.int32) + lanes
        start = pixel // step * (classes * step) + pixel % step
    live = tl.expand_dims(first + lanes < tl.load(head + SAMPLES), CLASS_AXIS)
    return classes, step, tl.expand_dims(start, CLASS_AXIS), live


@triton.jit
def _targets(head, options, t_at, at, j, label, classes, inside):
    """q and t of a tile. Scalar conditions shrink a mask's bound: a load whose mask is empty costs no traffic."""
    hard = tl.load(head + HARD).to(tl.int32)
    given = tl.load(t_at + at, mask=inside & (j < classes * (1 - hard)), other=0.0)
    t = given + (j == label).to(tl.float32) * hard.to(tl.float32)
    c_at = tl.load(head + WEIGHTS)
    c = tl.load(c_at.to(tl.pointer_type(tl.float32)) + j, mask=j < tl.where(c_at == 0, 0, classes), other=1.0)
    e = tl.load(options + SMOOTHING).to(tl.float32)
    q = c * ((1.0 - e) * t + e / classes.to(tl.float32))
    return tl.where(inside, q, 0.0), t
