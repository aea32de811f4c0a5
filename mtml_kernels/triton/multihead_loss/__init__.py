"""The losses of all heads and their gradients, in one launch whatever the heads' kinds and sizes.

With l_i, s_i, v_i of `reference.multihead_loss`:
    norm_h = sum_i s_i v_i (mean; 1 for "sum")      loss_h = sum_i s_i l_i / norm_h      dz_h = d loss_h / d logits_h
The formulas of a head are in `softmax` and `elements`. At most two launches: partial sums of the norms (left out where
none depends on the data, or the heads are small), then losses and gradients, where the last of a head's programs adds
up the partial sums. All tables come in one copy, those of the backward too. A vocabulary's heads, and heads of another
dtype, take launches of their own (`tile_of` says why). The backward is one launch more:
    grad_h = cotangent_h dz_h
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from mtml_kernels.schema.losses import HeadLoss
from mtml_kernels.triton.device import on
from mtml_kernels.triton.multihead_loss.kernels import empty_kernel, loss_kernel, norm_kernel, scale_kernel
from mtml_kernels.triton.multihead_loss.launches import Group, HeadShape, launches
from mtml_kernels.triton.multihead_loss.table import (
    FIELDS,
    INTEGERS,
    NORM_BLOCK,
    REGISTERS,
    upload,
)

__all__ = ["backward", "call_backward", "call_forward", "call_hand_out", "forward", "forward_in_place"]

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCALE_BLOCK, SCALE_EACH = 4096, 4  # elements at a time, times a program: most only find out that their factor is 1
OptionalTensors = Sequence[Tensor | None] | None


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
    loss NaN, and the gradient of its row or head. Only `check_labels` makes it an error: that waits for the device.

    Returns:
        losses float32 [H]; gradients, each of its logits' shape and dtype and contiguous (none without `want_grad`).

    Raises:
        ValueError: with `check_labels`, a label out of range.
    """
    if not logits:
        return torch.zeros(0), []
    gradients = [_like(z) for z in logits] if want_grad else []
    none: list[Tensor | None] = [None] * len(logits)
    columns = (sample_weights or none, class_weights or none, pos_weights or none, gradients or none)
    heads = [_head(*row) for row in zip(kinds, logits, targets, *columns, strict=True)]
    losses, scalings = _run(heads, logits[0].device, want_grad, check_labels, hand_out=want_grad)
    return losses, HandOut(gradients, scalings)


def forward_in_place(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    kinds: Sequence[HeadLoss],
    sample_weights: Sequence[Tensor | None],
    class_weights: Sequence[Tensor | None],
    pos_weights: Sequence[Tensor | None],
    *,
    want_grad: bool = True,
) -> Tensor:
    """Losses float32 [H] of contiguous logits; where `want_grad`, their gradients are written over the logits.

    Arguments as in `forward`. A program reads what it writes over, and nothing else does: rows (elements) have one
    program each, whose second pass over the classes writes a chunk after it has read it again.
    """
    columns = (kinds, logits, targets, sample_weights, class_weights, pos_weights, logits)
    return _run([_head(*row) for row in zip(*columns, strict=True)], logits[0].device, want_grad)[0]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class Head(NamedTuple):
    """One head: contiguous tensors, ids in int64, targets and weights in float32. `grad` is written."""

    spec: HeadLoss
    logits: Tensor
    target: Tensor
    grad: Tensor | None
    sample_weights: Tensor | None
    weights: Tensor | None  # of the classes, or bce's positive weights of one sample's elements

    def addresses(self) -> list[int]:
        """Of `ADDRESSES`, 0 where there is none."""
        return [0 if t is None else t.data_ptr() for t in (getattr(self, name) for name in ADDRESSES)]

    def shape(self) -> HeadShape:
        """What decides its launch."""
        own, hard = self.sample_weights, self.target.dtype == torch.int64
        aligned = not any(a % 16 for a in self.addresses())
        numbers = -1 if own is None else own.numel()
        weighted = self.weights is not None
        return HeadShape(self.spec, self.logits.shape, self.logits.dtype, hard, numbers, aligned, weighted)


ADDRESSES = ("logits", "target", "grad", "sample_weights", "weights")


def _head(
    spec: HeadLoss,
    logits: Tensor,
    target: Tensor,
    sample_weights: Tensor | None,
    class_weights: Tensor | None,
    pos_weight: Tensor | None,
    grad: Tensor | None,
) -> Head:
    ids = spec.kind == "cross_entropy" and not target.is_floating_point()
    weights = class_weights if spec.kind == "cross_entropy" else None
    if spec.kind == "bce_with_logits" and pos_weight is not None:
        weights = pos_weight.expand(logits.shape[1:])
    return Head(
        spec,
        _plain(logits),
        _plain(target.to(torch.int64 if ids else torch.float32)),
        grad,
        None if sample_weights is None else _plain(sample_weights.to(torch.float32)),
        None if weights is None else _plain(weights.to(torch.float32)),
    )


def _plain(t: Tensor) -> Tensor:
    """The tensor with its numbers in memory as they are, one after another."""
    return t.resolve_neg().contiguous()


def _run(
    heads: Sequence[Head], device: torch.device, want_grad: bool, check_labels: bool = False, hand_out: bool = False
) -> tuple[Tensor, list[Scaling]]:
    """Losses [heads]; gradients go where the heads say. `hand_out`: what scales them in place later."""
    losses = torch.empty(len(heads), dtype=torch.float32, device=device)
    groups = launches(tuple(head.shape() for head in heads))
    every = [[heads[slot] for slot in group.members] for group in groups]
    tables = [_addressed(group, members) for group, members in zip(groups, every, strict=True)]
    gradients = [head.grad for head in heads if head.grad is not None] if hand_out else []
    scalings = _scaling_tables(gradients, gradients)
    with on(device):
        uploaded = upload([*tables, *(table for _, table, _ in scalings)], device)  # in one piece
        for group, members, table in zip(groups, every, uploaded, strict=False):
            _launch(group, members, table, losses, want_grad)
            if check_labels:
                _raise_for_labels(group, members, table)
    pairs = zip(scalings, uploaded[len(groups) :], strict=True)
    return losses, [Scaling(dtype, table, programs) for (dtype, _, programs), table in pairs]


def _addressed(group: Group, heads: Sequence[Head]) -> Any:
    """The group's table with its heads' addresses."""
    table = group.table.copy()
    for name, column in zip(ADDRESSES, zip(*(head.addresses() for head in heads), strict=True), strict=True):
        table[name] = column
    return table


def _launch(group: Group, heads: Sequence[Head], table: Tensor, losses: Tensor, want_grad: bool) -> None:
    """Writes the losses and gradients of a group's heads."""
    norms = torch.empty(group.norm_programs, dtype=torch.float32, device=losses.device)
    partial = torch.empty(group.programs, dtype=torch.float32, device=losses.device)
    if group.norm_programs:
        norm_kernel[(group.norm_programs,)](table, len(heads), norms, NORM_BLOCK, num_warps=4, enable_fp_fusion=False)
    if group.programs:
        loss_kernel[(group.programs,)](
            table,
            table.view(torch.float64),
            len(heads),
            norms,
            partial,
            losses,
            DTYPES[heads[0].logits.dtype],
            group.used,
            group.wide_loads,
            want_grad,
            num_warps=group.warps,
            maxnreg=REGISTERS,
            enable_fp_fusion=False,
        )
    if group.empty:
        empty_kernel[(len(heads),)](table, losses, num_warps=1, enable_fp_fusion=False)


def _raise_for_labels(group: Group, heads: Sequence[Head], table: Tensor) -> None:
    """ValueError for the first head with a label out of range; waits for the device."""
    found = table[:, INTEGERS.index("bad_row")].tolist()
    for slot, head, described, row in zip(group.members, heads, group.table, found, strict=True):
        if row < described["samples"]:
            raise ValueError(
                f"targets: head {slot} expected class ids from 0 to {described['classes'] - 1} or ignore_index "
                f"{head.spec.ignore_index}, got {int(head.target.flatten()[row])} in row {row}"
            )


def backward(gradients: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """cotangent_h x gradient_h, in tensors of their own.

    Args:
        gradients: what `forward` returned. cotangents: [H].
    """
    results = [_like(g) for g in gradients]
    _scale([_plain(g) for g in gradients], results, cotangents)
    return results


class Scaling(NamedTuple):
    """A launch that multiplies gradients of one dtype by their heads' cotangents: its table on the device."""

    dtype: torch.dtype
    table: Tensor
    programs: int

    def run(self, factors: Tensor, in_place: bool) -> None:
        """factors [heads], contiguous float32. In place memory whose factor is 1 is left alone."""
        scale_kernel[(self.programs,)](
            self.table,
            len(self.table),
            factors,
            DTYPES[self.dtype],
            in_place,
            SCALE_BLOCK,
            SCALE_EACH,
            num_warps=8,
            enable_fp_fusion=False,
        )


class HandOut(list[Tensor]):
    """Gradients for cotangents 1, and the launches that scale them where they are; their tables have come already."""

    def __init__(self, gradients: Sequence[Tensor], scalings: Sequence[Scaling]) -> None:
        super().__init__(gradients)
        self.scalings = scalings


def _scaling_tables(gradients: Sequence[Tensor], results: Sequence[Tensor]) -> list[tuple[torch.dtype, Any, int]]:
    """(dtype, table, programs) of the launches that scale the gradients of all heads."""
    found = []
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        slots = [h for h, g in enumerate(gradients) if g.dtype == dtype]
        table = np.zeros(len(slots), FIELDS)
        table["slot"] = slots
        table["logits"] = [gradients[h].data_ptr() for h in slots]
        table["grad"] = [results[h].data_ptr() for h in slots]
        table["rows"] = [gradients[h].numel() for h in slots]
        blocks = -(-table["rows"] // (SCALE_BLOCK * SCALE_EACH))
        table["first"] = np.cumsum(blocks) - blocks
        if blocks.sum():
            found.append((dtype, table, int(blocks.sum())))
    return found


def _scale(gradients: Sequence[Tensor], results: Sequence[Tensor], cotangents: Tensor) -> None:
    factors = _plain(cotangents.to(torch.float32))
    made = _scaling_tables(gradients, results)
    with on(cotangents.device):
        for (dtype, _, programs), table in zip(made, upload([t for _, t, _ in made], cotangents.device), strict=True):
            Scaling(dtype, table, programs).run(factors, gradients is results)


def call_forward(call: Any, tensors: Any, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
    """`forward` for the op's registry: a `HeadsCall` and `HeadTensors`, whose entries may be stacks of equal heads.

    Returns:
        losses in the logits' dtype [sum of the stacks' heights]; the gradient of every entry.
    """
    gradients = [_like(z) for z in tensors.logits] if differentiate else []
    columns = (*tensors, gradients or [None] * len(tensors.logits))
    heads: list[Head] = []
    for spec, stacked, count, *entry in zip(call.specs, call.stacked, call.counts, *columns, strict=True):
        for i in range(count):
            z, *rest = (t[i] if stacked and t is not None else t for t in entry)
            heads.append(_head(spec, z, *rest))
    like = tensors.logits[0]
    losses, scalings = _run(heads, like.device, differentiate, hand_out=differentiate)
    return losses.to(like.dtype), HandOut(gradients, scalings)


def call_backward(gradients: Sequence[Tensor], cotangent: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`backward` for the op's registry: every entry's gradient times the cotangents of its stack, [sum of counts]."""
    results = [_like(g) for g in gradients]
    _scale(_unstack(gradients, counts), _unstack(results, counts), cotangent)
    return results


def call_hand_out(gradients: Sequence[Tensor], cotangent: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`call_backward`, written over the gradients: no memory, and no traffic for those whose cotangent is 1."""
    if isinstance(gradients, HandOut):
        factors = _plain(cotangent.to(torch.float32))
        with on(cotangent.device):
            for scaling in gradients.scalings:
                scaling.run(factors, True)
    else:
        heads = _unstack(gradients, counts)
        _scale(heads, heads, cotangent)
    return list(gradients)


def _unstack(entries: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The gradient of every head, contiguous; of entries that are contiguous, views."""
    pairs = [(entry, count) for entry, count in zip(entries, counts, strict=True) if count]
    return [head for entry, count in pairs for head in entry.contiguous().reshape(count, -1).unbind()]
