"""The kernels that `multihead_loss` launches: one program a tile, whichever head it belongs to."""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.triton.multihead_loss.elements import element_tile
from mtml_kernels.triton.multihead_loss.rows import CLASSES, HARD, NORM_FIRST, WORDS, head_of, label_rows, norm_scale
from mtml_kernels.triton.multihead_loss.softmax import softmax_tile
from mtml_kernels.triton.multihead_loss.table import TILES, word

__all__ = ["finish_kernel", "loss_kernel", "norm_kernel", "scale_kernel"]

LOGITS = word("logits")
GRAD = word("grad")
ROWS = word("rows")
WEIGHTS = word("weights")
FIRST = word("first")
BLOCKS = word("blocks")
TILE = word("tile")
TILES_OF_HEAD = word("tiles")
EACH = word("each")
SLOT = word("slot")
TINY_ROWS, TINY_CLASSES = tl.constexpr(TILES[0].rows), tl.constexpr(TILES[0].classes)
NARROW_ROWS, NARROW_CLASSES = tl.constexpr(TILES[1].rows), tl.constexpr(TILES[1].classes)
WIDE_ROWS, WIDE_CLASSES = tl.constexpr(TILES[2].rows), tl.constexpr(TILES[2].classes)
VOCABULARY_ROWS, VOCABULARY_CLASSES = tl.constexpr(TILES[3].rows), tl.constexpr(TILES[3].classes)
PIXELS_ROWS, PIXELS_CLASSES = tl.constexpr(TILES[4].rows), tl.constexpr(TILES[4].classes)
ELEMENTS_ROWS = tl.constexpr(TILES[5].rows)


@triton.jit(do_not_specialize=["heads"])
def norm_kernel(table, heads, norms, BLOCK: tl.constexpr):
    """norms[program]: sum of s_i v_i over BLOCK samples of a head."""
    program = tl.program_id(0)
    h = head_of(table, heads, program, NORM_FIRST)
    head = table + h * WORDS
    first = (program - tl.load(head + NORM_FIRST)) * BLOCK
    s, y, counted, bad = label_rows(head, first, tl.arange(0, BLOCK))
    c_at = tl.load(head + WEIGHTS)
    limit = tl.where(c_at == 0, 0, tl.load(head + CLASSES) * tl.load(head + HARD))
    c = tl.load(c_at.to(tl.pointer_type(tl.float32)) + y, mask=counted & (y >= 0) & (y < limit), other=1.0)
    tl.store(norms + program, tl.sum(tl.where(bad, float("nan"), tl.where(counted, s * c, 0.0)), 0))


@triton.jit(do_not_specialize=["heads"])
def loss_kernel(
    table,
    options,
    heads,
    norms,
    partial,
    TYPE: tl.constexpr,
    USED: tl.constexpr,  # bit i: some head takes tile i; the code of other tiles is left out
    ALIGNED: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    """partial[program]: the loss of a few tiles of one head; their gradient is written where WANT_GRAD."""
    program = tl.program_id(0)
    h = head_of(table, heads, program, FIRST)
    head = table + h * WORDS
    options += h * WORDS
    tile = tl.load(head + TILE)
    each = tl.load(head + EACH)
    begin = (program - tl.load(head + FIRST)) * each
    end = tl.minimum(begin + each, tl.load(head + TILES_OF_HEAD))
    scale = norm_scale(head, options, norms)
    total = tl.zeros([1], tl.float32)
    for at in range(begin, end):
        if USED & 1:
            if tile == 0:
                total += softmax_tile(head, options, at, scale, TYPE, TINY_ROWS, TINY_CLASSES, 1, False, WANT_GRAD)
        if USED & 2:
            if tile == 1:
                total += softmax_tile(head, options, at, scale, TYPE, NARROW_ROWS, NARROW_CLASSES, 1, False, WANT_GRAD)
        if USED & 4:
            if tile == 2:
                total += softmax_tile(head, options, at, scale, TYPE, WIDE_ROWS, WIDE_CLASSES, 1, False, WANT_GRAD)
        if USED & 8:
            if tile == 3:
                total += softmax_tile(
                    head, options, at, scale, TYPE, VOCABULARY_ROWS, VOCABULARY_CLASSES, 1, ALIGNED, WANT_GRAD
                )
        if USED & 16:
            if tile == 4:
                total += softmax_tile(head, options, at, scale, TYPE, PIXELS_ROWS, PIXELS_CLASSES, 0, False, WANT_GRAD)
        if USED & 32:
            if tile == 5:
                total += element_tile(head, options, at, scale, TYPE, ELEMENTS_ROWS, WANT_GRAD)
    tl.store(partial + program + tl.arange(0, 1), total)


@triton.jit
def finish_kernel(table, partial, losses, BLOCK: tl.constexpr):
    """losses[head]: the sum of its partial sums, in a fixed order."""
    head = table + tl.program_id(0) * WORDS
    first = tl.load(head + FIRST)
    blocks = tl.load(head + BLOCKS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for b in range(0, blocks, BLOCK):
        total += tl.load(partial + first + b + lanes, mask=b + lanes < blocks, other=0.0)
    tl.store(losses + tl.load(head + SLOT), tl.sum(total, 0))


@triton.jit(do_not_specialize=["heads"])
def scale_kernel(table, heads, cotangents, TYPE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """grad = cotangent x saved gradient (where the logits' address stands in the table), BLOCK elements of one head."""
    program = tl.program_id(0)
    head = table + head_of(table, heads, program, FIRST) * WORDS
    at = (program - tl.load(head + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(cotangents + tl.load(head + SLOT))
    elements = tl.load(head + ROWS)
    if IN_PLACE:
        elements = tl.where(factor == 1.0, 0, elements)  # what is right as it lies there costs no traffic
    live = at < elements
    saved = tl.load(tl.load(head + LOGITS).to(tl.pointer_type(TYPE)) + at, mask=live, other=0.0).to(tl.float32)
    tl.store(tl.load(head + GRAD).to(tl.pointer_type(TYPE)) + at, (factor * saved).to(TYPE), mask=live)
