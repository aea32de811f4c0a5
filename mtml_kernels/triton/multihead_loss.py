"""The losses of all heads and their gradients, in one launch whatever the heads' kinds and sizes.

With l_i, s_i, v_i of `reference.multihead_loss`:
    norm_h = sum_i s_i v_i (mean; 1 for "sum")      loss_h = sum_i s_i l_i / norm_h      dz_h = d loss_h / d logits_h
The formulas of a head are in `_heads_softmax` and `_heads_elements`. Three launches in all: partial sums of the norms
(left out where none depends on the data), losses and gradients, the sum of the losses' partial sums. A vocabulary's
heads, and heads of another dtype, take launches of their own (`tile_of` says why). The backward is one launch more:
    grad_h = cotangent_h dz_h
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.heads import HeadLoss
from mtml_kernels.triton._heads_elements import element_tile
from mtml_kernels.triton._heads_rows import CLASSES, HARD, NORM_FIRST, WORDS, head_of, label_rows, norm_scale
from mtml_kernels.triton._heads_softmax import softmax_tile
from mtml_kernels.triton._heads_table import FIELDS, FINISH_BLOCK, INTEGERS, NORM_BLOCK, TILES, Head, describe, upload, word

__all__ = ["backward", "forward"]

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCALE_BLOCK = 4096
LOGITS = word("logits")
GRAD = word("grad")
ROWS = word("rows")
WEIGHTS = word("weights")
FIRST = word("first")
BLOCKS = word("blocks")
TILE = word("tile")
SLOT = word("slot")
TINY_ROWS, TINY_CLASSES = tl.constexpr(TILES[0].rows), tl.constexpr(TILES[0].classes)
NARROW_ROWS, NARROW_CLASSES = tl.constexpr(TILES[1].rows), tl.constexpr(TILES[1].classes)
WIDE_ROWS, WIDE_CLASSES = tl.constexpr(TILES[2].rows), tl.constexpr(TILES[2].classes)
VOCABULARY_ROWS, VOCABULARY_CLASSES = tl.constexpr(TILES[3].rows), tl.constexpr(TILES[3].classes)
PIXELS_ROWS, PIXELS_CLASSES = tl.constexpr(TILES[4].rows), tl.constexpr(TILES[4].classes)
ELEMENTS_ROWS = tl.constexpr(TILES[5].rows)
OptionalTensors = Sequence[Tensor | None] | None


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
    """partial[program]: the loss of one tile; its gradient is written where WANT_GRAD."""
    program = tl.program_id(0)
    h = head_of(table, heads, program, FIRST)
    head = table + h * WORDS
    options += h * WORDS
    block = program - tl.load(head + FIRST)
    tile = tl.load(head + TILE)
    scale = norm_scale(head, options, norms)
    partial += program
    if USED & 1:
        if tile == 0:
            softmax_tile(head, options, block, scale, partial, TYPE, TINY_ROWS, TINY_CLASSES, 1, False, WANT_GRAD)
    if USED & 2:
        if tile == 1:
            softmax_tile(head, options, block, scale, partial, TYPE, NARROW_ROWS, NARROW_CLASSES, 1, False, WANT_GRAD)
    if USED & 4:
        if tile == 2:
            softmax_tile(head, options, block, scale, partial, TYPE, WIDE_ROWS, WIDE_CLASSES, 1, False, WANT_GRAD)
    if USED & 8:
        if tile == 3:
            softmax_tile(head, options, block, scale, partial, TYPE, VOCABULARY_ROWS, VOCABULARY_CLASSES, 1, ALIGNED, WANT_GRAD)
    if USED & 16:
        if tile == 4:
            softmax_tile(head, options, block, scale, partial, TYPE, PIXELS_ROWS, PIXELS_CLASSES, 0, False, WANT_GRAD)
    if USED & 32:
        if tile == 5:
            element_tile(head, options, block, scale, partial, TYPE, ELEMENTS_ROWS, WANT_GRAD)


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
def scale_kernel(table, heads, cotangents, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """grad = cotangent x saved gradient (where the logits' address stands in the table), BLOCK elements of one head."""
    program = tl.program_id(0)
    head = table + head_of(table, heads, program, FIRST) * WORDS
    at = (program - tl.load(head + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    live = at < tl.load(head + ROWS)
    factor = tl.load(cotangents + tl.load(head + SLOT))
    saved = tl.load(tl.load(head + LOGITS).to(tl.pointer_type(TYPE)) + at, mask=live, other=0.0).to(tl.float32)
    tl.store(tl.load(head + GRAD).to(tl.pointer_type(TYPE)) + at, (factor * saved).to(TYPE), mask=live)


def forward(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[HeadLoss],
    sample_weights: OptionalTensors = None,
    class_weights: OptionalTensors = None,
    pos_weights: OptionalTensors = None,
    want_grad: bool = True,
    check_labels: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Losses of all heads and, where `want_grad`, their gradients for cotangents 1.

    Arguments as in `reference.multihead_loss`, checked by the op; logits in float32, float16 or bfloat16, all on one
    device; everything else is computed in float32. A label out of range is never used as an index: it makes its head's
    loss NaN, and its row's gradient. Only `check_labels` turns it into an error, for that waits for the device.

    Returns:
        losses float32 [H]; gradients, each of its logits' shape and dtype and contiguous (an empty list without `want_grad`).

    Raises:
        ValueError: with `check_labels`, a label out of range.
    """
    if not logits:
        return torch.zeros(0), []
    device = logits[0].device
    losses = torch.empty(len(logits), dtype=torch.float32, device=device)
    none: list[Tensor | None] = [None] * len(logits)
    columns = (sample_weights or none, class_weights or none, pos_weights or none)
    heads = [
        _head(slot, *head, want_grad) for slot, head in enumerate(zip(kinds, logits, targets, *columns, strict=True))
    ]
    with _on(device):
        for group in _groups(heads):
            table = _launch(group, losses, want_grad)
            if check_labels:
                _raise_for_labels(group, table)
    return losses, [head.grad for head in heads if head.grad is not None]


def _head(
    slot: int,
    spec: HeadLoss,
    logits: Tensor,
    target: Tensor,
    sample_weights: Tensor | None,
    class_weights: Tensor | None,
    pos_weight: Tensor | None,
    want_grad: bool,
) -> Head:
    """A head's tensors as the kernels take them: contiguous, ids in int64 and everything else in float32."""
    logits = logits.detach().contiguous()
    ids = spec.kind == "cross_entropy" and not target.is_floating_point()
    weights = class_weights
    if spec.kind == "bce_with_logits" and pos_weight is not None:
        weights = pos_weight.expand(logits.shape[1:])
    grad = torch.empty_like(logits) if want_grad else None
    return Head(
        slot,
        spec,
        logits,
        target.detach().to(torch.int64 if ids else torch.float32).contiguous(),
        grad,
        None if sample_weights is None else sample_weights.detach().to(torch.float32).contiguous(),
        None if weights is None else weights.detach().to(torch.float32).contiguous(),
    )


def _groups(heads: Sequence[Head]) -> Iterator[list[Head]]:
    """The heads that share a launch: by what the head itself decides, so that its bits depend on no other."""
    groups: dict[Any, list[Head]] = {}
    for head in heads:
        groups.setdefault((head.logits.dtype, TILES[head.tile].warps, head.aligned), []).append(head)
    yield from groups.values()


def _launch(heads: Sequence[Head], losses: Tensor, want_grad: bool) -> Tensor:
    """Writes the losses and gradients of heads of one group; returns their table on the device."""
    host = describe(heads)
    table = upload(host, losses.device)
    norm_programs, programs = int(host["norm_blocks"].sum()), int(host["blocks"].sum())
    norms = torch.empty(norm_programs, dtype=torch.float32, device=losses.device)
    partial = torch.empty(programs, dtype=torch.float32, device=losses.device)
    if norm_programs:
        norm_kernel[(norm_programs,)](table, len(heads), norms, NORM_BLOCK, num_warps=4, enable_fp_fusion=False)
    if programs:
        loss_kernel[(programs,)](
            table,
            table.view(torch.float64),
            len(heads),
            norms,
            partial,
            DTYPES[heads[0].logits.dtype],
            sum(1 << tile for tile in {head.tile for head in heads}),
            heads[0].aligned,
            want_grad,
            num_warps=TILES[heads[0].tile].warps,
            enable_fp_fusion=False,
        )
    finish_kernel[(len(heads),)](table, partial, losses, FINISH_BLOCK, num_warps=4, enable_fp_fusion=False)
    return table


def _raise_for_labels(heads: Sequence[Head], table: Tensor) -> None:
    for head, row in zip(heads, table[:, INTEGERS.index("bad_row")].tolist(), strict=True):
        rows, classes, _, samples = head.layout()
        if head.hard and row < samples:
            label = int(head.target.reshape(rows)[row])
            raise ValueError(
                f"targets: head {head.slot} expected class ids from 0 to {classes - 1} or ignore_index "
                f"{head.spec.ignore_index}, got {label} in row {row}"
            )


def backward(gradients: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """cotangent_h x gradient_h, in tensors of their own.

    Args:
        gradients: what `forward` returned. cotangents: [H].
    """
    gradients = [g.contiguous() for g in gradients]
    results = [torch.empty_like(g) for g in gradients]
    factors = cotangents.detach().to(torch.float32).contiguous()
    with _on(cotangents.device):
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            slots = [h for h, g in enumerate(gradients) if g.dtype == dtype]
            host = np.zeros(len(slots), FIELDS)
            host["slot"] = slots
            host["logits"] = [gradients[h].data_ptr() for h in slots]
            host["grad"] = [results[h].data_ptr() for h in slots]
            host["rows"] = [gradients[h].numel() for h in slots]
            blocks = -(-host["rows"] // SCALE_BLOCK)
            host["first"] = np.cumsum(blocks) - blocks
            if blocks.sum():
                table = upload(host, cotangents.device)
                grid = (int(blocks.sum()),)
                scale_kernel[grid](
                    table, len(slots), factors, DTYPES[dtype], SCALE_BLOCK, num_warps=8, enable_fp_fusion=False
                )
    return results


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
