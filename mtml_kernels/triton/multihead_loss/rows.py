"""What all kernels of the multi-head losses do with the table: find the head, load a row's weight and label."""

from __future__ import annotations

import triton
import triton.language as tl

from mtml_kernels.triton.multihead_loss.table import FLOATS, INTEGERS, word

__all__ = ["WORDS", "head_of", "label_rows", "norm_of", "norm_scale", "split"]

WORDS = tl.constexpr(len(INTEGERS) + len(FLOATS))
FIRST = word("first")
TARGET = word("target")
SAMPLE_WEIGHTS = word("sample_weights")
HARD = word("hard")
CLASSES = word("classes")
SAMPLES = word("samples")
REPEAT = word("repeat")
IGNORE = word("ignore")
NORM_FIRST = word("norm_first")
NORM_BLOCKS = word("norm_blocks")
NORM = word("norm")
SEARCH = tl.constexpr(64)  # table rows looked at together
WEIGHTS = word("weights")
ALONE = word("alone")
PARTS = tl.constexpr(128)  # partial sums of a norm added together


@triton.jit
def head_of(table, heads, program, FIELD: tl.constexpr):
    """The head whose programs, from the one in FIELD on, hold this one. Heads without programs are passed over."""
    found = -1
    for h in range(0, heads, SEARCH):
        at = h + tl.arange(0, SEARCH)
        first = tl.load(table + at * WORDS + FIELD, mask=at < heads, other=program + 1)
        found += tl.sum((first <= program).to(tl.int32), 0)
    return found


@triton.jit
def split(first, lanes, size):
    """(first + lanes) divided by size: quotient in 64 bits, remainder in 32.

    One division in 64 bits for the block; the lanes divide in 32 bits, a quarter of the instructions.
    """
    size32 = size.to(tl.int32)
    rest = (first % size).to(tl.int32) + lanes
    return first // size + rest // size32, rest % size32


@triton.jit
def label_rows(head, first, lanes):
    """Of the rows first + lanes: sample weight, label, whether they count, whether their label is out of range.

    Rows beyond the last do not count. Where the target is not class ids every row has label 0.
    """
    samples = tl.load(head + SAMPLES)
    hard = tl.load(head + HARD)
    row = first + lanes
    ids = tl.load(head + TARGET).to(tl.pointer_type(tl.int64))
    y = tl.load(ids + row, mask=row < samples * hard, other=0)
    counted = (row < samples) & (y != tl.load(head + IGNORE))
    bad = counted & ((y < 0) | (y >= tl.load(head + CLASSES)))
    own = tl.load(head + SAMPLE_WEIGHTS)
    at, _ = split(first, lanes, tl.load(head + REPEAT))
    s = tl.load(own.to(tl.pointer_type(tl.float32)) + at, mask=row < tl.where(own == 0, 0, samples), other=1.0)
    return s, y, counted, bad


@triton.jit
def norm_of(head, first, lanes):
    """The sum of s_i v_i over the samples first + lanes."""
    s, y, counted, bad = label_rows(head, first, lanes)
    c_at = tl.load(head + WEIGHTS)
    limit = tl.where(c_at == 0, 0, tl.load(head + CLASSES) * tl.load(head + HARD))
    c = tl.load(c_at.to(tl.pointer_type(tl.float32)) + y, mask=counted & (y >= 0) & (y < limit), other=1.0)
    return tl.sum(tl.where(bad, float("nan"), tl.where(counted, s * c, 0.0)), 0)


@triton.jit
def norm_scale(head, options, norms):
    """1 / norm, its parts added in a fixed order; 0 where the norm is 0, NaN where it is infinite."""
    lanes = tl.arange(0, PARTS)
    if tl.load(head + ALONE) != 0:
        norm = tl.zeros([], tl.float32)
        for sample in range(0, tl.load(head + SAMPLES).to(tl.int32), PARTS):
            norm += norm_of(head, sample, lanes)
    else:
        first = tl.load(head + NORM_FIRST)
        blocks = tl.load(head + NORM_BLOCKS)
        parts = tl.zeros([PARTS], tl.float32)
        for b in range(0, blocks, PARTS):
            parts += tl.load(norms + first + b + lanes, mask=b + lanes < blocks, other=0.0)
        norm = tl.where(blocks == 0, tl.load(options + NORM).to(tl.float32), tl.sum(parts, 0))
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm) + 0.0 * norm)  # 1 / inf would be 0
