"""The kernels that `multihead_loss` launches: one program a tile, whichever head it belongs to."""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.triton.multihead_loss.elements import element_tile
from mtml_kernels.triton.multihead_loss.rows import NORM_FIRST, WORDS, head_of, norm_of, norm_scale
from mtml_kernels.triton.multihead_loss.softmax import label_tile, softmax_tile
from mtml_kernels.triton.multihead_loss.table import FINISH_BLOCK, TILES, word

__all__ = ["empty_kernel", "loss_kernel", "norm_kernel", "scale_kernel"]

LOGITS = word("logits")
GRAD = word("grad")
ROWS = word("rows")
FIRST = word("first")
BLOCKS = word("blocks")
TILE = word("tile")
TILES_OF_HEAD = word("tiles")
EACH = word("each")
DONE = word("done")
PARTS = tl.constexpr(FINISH_BLOCK)
SLOT = word("slot")
TINY_ROWS, TINY_CLASSES = tl.constexpr(TILES[0].rows), tl.constexpr(TILES[0].classes)
NARROW_ROWS, NARROW_CLASSES = tl.constexpr(TILES[1].rows), tl.constexpr(TILES[1].classes)
WIDE_ROWS, WIDE_CLASSES = tl.constexpr(TILES[2].rows), tl.constexpr(TILES[2].classes)
VOCABULARY_ROWS, VOCABULARY_CLASSES = tl.constexpr(TILES[3].rows), tl.constexpr(TILES[3].classes)
PIXELS_ROWS, PIXELS_CLASSES = tl.constexpr(TILES[4].rows), tl.constexpr(TILES[4].classes)
LABEL_CLASSES = tl.constexpr(TILES[9].classes)  # of a vocabulary
ELEMENTS_ROWS = tl.constexpr(TILES[5].rows)


@triton.jit(do_not_specialize=["heads"])
def norm_kernel(table, heads, norms, BLOCK: tl.constexpr):
    """norms[program]: sum of s_i v_i over BLOCK samples of a head."""
    program = tl.program_id(0)
    h = head_of(table, heads, program, NORM_FIRST)
    head = table + h * WORDS
    first = (program - tl.load(head + NORM_FIRST)) * BLOCK
    tl.store(norms + program, norm_of(head, first, tl.arange(0, BLOCK)))


@triton.jit(do_not_specialize=["heads"])
def loss_kernel(
    table,
    options,
    heads,
    norms,
    partial,
    losses,
    TYPE: tl.constexpr,
    USED: tl.constexpr,  # bit i: some head takes tile i; the code of other tiles is left out
    ALIGNED: tl.constexpr,
    WANT_GRAD: tl.constexpr,
):
    """partial[program]: the loss of a few tiles of one head; their gradient is written where WANT_GRAD.

    The last of a head's programs adds them up: which one that is decides nothing, for their order is fixed.
    """
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
        if USED & 64:
            if tile == 6:
                total += label_tile(head, at, scale, TYPE, TINY_ROWS, TINY_CLASSES, 1, False, WANT_GRAD)
        if USED & 128:
            if tile == 7:
                total += label_tile(head, at, scale, TYPE, NARROW_ROWS, NARROW_CLASSES, 1, False, WANT_GRAD)
        if USED & 256:
            if tile == 8:
                total += label_tile(head, at, scale, TYPE, WIDE_ROWS, WIDE_CLASSES, 1, False, WANT_GRAD)
        if USED & 512:
            if tile == 9:
                total += label_tile(head, at, scale, TYPE, VOCABULARY_ROWS, LABEL_CLASSES, 1, ALIGNED, WANT_GRAD)
        if USED & 1024:
            if tile == 10:
                total += label_tile(head, at, scale, TYPE, PIXELS_ROWS, PIXELS_CLASSES, 0, False, WANT_GRAD)
    tl.store(partial + program + tl.arange(0, 1), total)
    if tl.load(head + BLOCKS) == 1:
        tl.store(losses + tl.load(head + SLOT) + tl.arange(0, 1), total)
    else:
        tl.debug_barrier()  # the loss is stored before it is counted
        if tl.atomic_add(head + DONE, 1, sem="acq_rel") == tl.load(head + BLOCKS) - 1:
            finish(head, partial, losses, PARTS)


@triton.jit
def finish(head, partial, losses, BLOCK: tl.constexpr):
    """A head's loss: the sum of its partial sums, in a fixed order. Past L1, which knows nothing of other programs."""
    first = tl.load(head + FIRST)
    blocks = tl.load(head + BLOCKS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for b in range(0, blocks, BLOCK):
        total += tl.load(partial + first + b + lanes, mask=b + lanes < blocks, other=0.0, cache_modifier=".cg")
    tl.store(losses + tl.load(head + SLOT), tl.sum(total, 0))


@triton.jit
def empty_kernel(table, losses):
    """losses[head] = 0 of every head that has no programs."""
    head = table + tl.program_id(0) * WORDS
    if tl.load(head + BLOCKS) == 0:
        tl.store(losses + tl.load(head + SLOT), 0.0)


@triton.jit(do_not_specialize=["heads"])
def scale_kernel(
    table,
    heads,
    cotangents,
    TYPE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """grad = cotangent x saved gradient (where the logits' address stands in the table), EACH BLOCKs of one head."""
    program = tl.program_id(0)
    head = table + head_of(table, heads, program, FIRST) * WORDS
    factor = tl.load(cotangents + tl.load(head + SLOT))
    changed = True
    if IN_PLACE:
        changed = factor != 1.0  # what is right as it lies there costs no traffic
    if changed:
        elements = tl.load(head + ROWS)
        saved_at = tl.load(head + LOGITS).to(tl.pointer_type(TYPE))
        result_at = tl.load(head + GRAD).to(tl.pointer_type(TYPE))
        first = (program - tl.load(head + FIRST)) * EACH * BLOCK
        for i in range(EACH):
            at = first + i * BLOCK + tl.arange(0, BLOCK)
            saved = tl.load(saved_at + at, mask=at < elements, other=0.0).to(tl.float32)
            tl.store(result_at + at, (factor * saved).to(TYPE), mask=at < elements)
