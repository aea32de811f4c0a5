"""Linear heads with their losses on a GPU: cuBLAS products around the kernels of `multihead_loss`, by chunks of rows.

A head with weight W [C, D] and bias b [C], on a chunk x [R, D] of its features' rows; l_i, s_i, v_i and norm as in
`reference.multihead_loss`, E elements in a row (1 for softmax kinds):
    z = x W^T + b           loss += sum_i s_i l_i            dz = d sum_i s_i l_i / d z, written over z
    dx = dz W               dW += dz^T x                     db += sum_i dz_i
Of the logits only z is held. The mean's factor 1 / (E norm) (1 for "sum") comes last, to the losses in the forward pass
and to the gradients in backward, with the cotangent: nothing grows small with many rows before it is in float32, in
which dx, dW and db are kept, and half precision is rounded once.

Heads whose logits are small keep dz of all rows, of their own loss with its mean, as `multihead_loss` does: one launch
for all heads of the same features, and products in backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.schema.linear_multihead_loss import Grads, LinearHead, Wants
from mtml_kernels.schema.losses import CLASS_KINDS, HeadLoss
from mtml_kernels.triton.multihead_loss import backward, forward_in_place

__all__ = ["Problem", "add_product", "chunk_rows", "half_product"]

CHUNK_BYTES = 64 << 20
CHUNK_ROWS = 1024


def chunk_rows(classes: int, itemsize: int) -> int:
    """The launch policy: how many rows of a head are worked on at a time.

    A chunk's product dz^T x adds to dW [C, D], which is read and written in float32: R / 4 operations a byte. A GPU
    whose tensor cores do 300 operations for a byte of memory computes for as long as it waits for memory at 1200 rows,
    and a vocabulary of 128 256 words takes 263 MB for 1024 rows in half precision: hence 1024. Narrower heads take the
    rows of 64 MB, so that their products fill the multiprocessors. The number of rows and other heads play no part.
    Reasoned, not yet measured.
    """
    return max(CHUNK_ROWS, CHUNK_BYTES // max(classes * itemsize, 1) // 128 * 128)


class Problem:
    """Heads on the same features [N, D]; the same methods as the compiled engine's `Problem`, cotangents as tensors.

    large: the one head's logits may not be held. Nothing here waits for the device.
    """

    def __init__(self, features: Tensor, heads: Sequence[LinearHead], large: bool) -> None:
        self.features, self.heads, self.large = features, list(heads), large

    def keep(self) -> tuple[Tensor, list[Tensor]]:
        """The losses [H] and the gradients of each at its logits, [N, C] each."""
        logits = self._logits()
        return _losses(logits, self.heads, True).to(self.features.dtype), logits

    def back(self, kept: Sequence[Tensor], cotangents: Sequence[Tensor], wants: Wants) -> tuple[Any, Grads, Grads]:
        """Gradients of sum_h cotangents[h] loss_h at features, weights and biases, from what `keep` kept."""
        own = backward(kept, torch.stack(list(cotangents)))
        dx: Tensor | None = None
        for dz, h in zip(own, self.heads, strict=True):
            dx = add_product(dx, dz, h.weight) if wants.features else None
        dtype = self.features.dtype
        dw = [add_product(None, dz.t(), self.features).to(dtype) if w else None for dz, w in _pairs(own, wants.weights)]
        db = [dz.sum(0, dtype=torch.float32).to(dtype) if w else None for dz, w in _pairs(own, wants.biases)]
        return dx if dx is None else dx.to(dtype), dw, db

    def blocks(self, wants: Wants) -> tuple[Tensor, Tensor | None, Grads, Grads]:
        """The losses, and what `times` makes the gradients of; of small heads, only the losses are ever asked for."""
        if self.large:
            total, dx, dw, db = _by_chunks(self.features, self.heads[0], wants)
            return (total * self.factor).to(self.features.dtype), dx, [dw], [db]
        none: Grads = [None] * len(self.heads)
        return _losses(self._logits(), self.heads, False).to(self.features.dtype), None, none, none

    def times(self, made: Sequence[Tensor | None], cotangent: Tensor) -> list[Tensor | None]:
        """The gradients of cotangent x the large head's loss, from those of its sum, which may be written over."""
        factor = cotangent.to(torch.float32) * self.factor
        return [g if g is None else torch.mul(g, factor, out=_like(g, self.features.dtype)) for g in made]

    @functools.cached_property
    def factor(self) -> Tensor | float:
        """The large head's `mean_factor`."""
        return mean_factor(self.heads[0], self.features.shape[0])

    def _logits(self) -> list[Tensor]:
        shapes = [(self.features.shape[0], h.weight.shape[0]) for h in self.heads]
        room = [torch.empty(s, dtype=self.features.dtype, device=self.features.device) for s in shapes]
        return [linear(z, self.features, h) for z, h in zip(room, self.heads, strict=True)]


def _like(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient itself where it has the dtype that is asked for, else new memory."""
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)


def _pairs(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[tuple[Tensor, bool]]:
    return list(zip(tensors, wanted, strict=True))


def _losses(logits: Sequence[Tensor], heads: Sequence[LinearHead], want_grad: bool) -> Tensor:
    """The losses [H] in float32; where `want_grad`, their gradients are written over the logits."""
    return forward_in_place(
        logits,
        [h.target for h in heads],
        [h.spec for h in heads],
        [h.sample_weights for h in heads],
        [h.class_weights for h in heads],
        [h.pos_weights for h in heads],
        want_grad=want_grad,
    )


def _by_chunks(features: Tensor, h: LinearHead, wants: Wants) -> tuple[Tensor, Any, Any, Any]:
    """The sum [1] of a head's losses, and its gradients in float32, None where they are not wanted."""
    rows, classes = features.shape[0], h.weight.shape[0]
    size = min(rows, chunk_rows(classes, features.dtype.itemsize))
    room = torch.empty((size, classes), dtype=features.dtype, device=features.device)
    total = dataclasses.replace(h.spec, reduction="sum")
    wanted = wants.features or wants.weights[0] or wants.biases[0]
    dx = torch.empty(features.shape, dtype=torch.float32, device=features.device) if wants.features else None
    dw: Tensor | None = None
    db: Tensor | None = None
    losses = []
    for first in range(0, rows, size):
        x = features[first : first + size]
        z = linear(room[: len(x)], x, h)
        losses.append(_losses([z], [_part(h, total, first, len(x))], wanted))
        if dx is not None:
            add_product(None, z, h.weight, dx[first : first + size])
        dw = add_product(dw, z.t(), x) if wants.weights[0] else None
        if wants.biases[0]:
            each = z.sum(0, dtype=torch.float32)
            db = each if db is None else db.add_(each)
    return torch.stack(losses).sum(0), dx, dw, db


def _part(h: LinearHead, spec: HeadLoss, first: int, rows: int) -> LinearHead:
    """A head on some rows of its target."""
    own = None if h.sample_weights is None else h.sample_weights[first : first + rows]
    return h._replace(spec=spec, target=h.target[first : first + rows], sample_weights=own)


def linear(out: Tensor, x: Tensor, h: LinearHead) -> Tensor:
    """x W^T + b, written to `out` (autocast does not change products that say where they go)."""
    if h.bias is None:
        return torch.mm(x, h.weight.t(), out=out)
    return torch.addmm(h.bias, x, h.weight.t(), out=out)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """total + a b, written over the total; without one a b, in `out` or new memory. The sum is float32 throughout."""
    if not a.is_cuda:
        a, b = a.float(), b.float()
    beta = 0 if total is None else 1
    if total is None:
        total = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device) if out is None else out
    if a.dtype == torch.float32:
        return torch.addmm(total, a, b, beta=beta, out=total)
    return half_product(total, a, b, beta)


def half_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> Tensor:
    """beta total + a b of half precision, as cuBLAS adds it up: in float32. PyTorch has this for CUDA tensors alone."""
    return torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)


def mean_factor(h: LinearHead, rows: int) -> Tensor | float:
    """What the loss of sums is multiplied by, 1 / (E norm) for the mean; 0 where no row counts."""
    spec, classes = h.spec, h.weight.shape[0]
    if spec.reduction == "sum":
        return 1.0
    outputs = classes // 2 if spec.kind == "gaussian_nll" else classes
    elements = 1 if spec.kind in CLASS_KINDS else max(outputs, 1)
    counts = None if h.sample_weights is None else h.sample_weights.float()
    if spec.kind == "cross_entropy" and not h.target.is_floating_point():
        counted = (h.target != spec.ignore_index).float()
        if h.class_weights is not None:  # a label out of range makes the loss NaN, whatever stands here
            counted = counted * h.class_weights.float()[h.target.clamp(0, classes - 1)]
        counts = counted if counts is None else counts * counted
    if counts is None:
        return 1 / (elements * rows)
    norm = counts.sum()
    return (norm * elements).reciprocal().masked_fill_(norm == 0, 0.0)
