"""The compiled linear heads: their losses, and the gradients at features, weights and biases, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import label_message
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import addresses_of, checked, recycled, recycled_like
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.linear_multihead_loss import TENSORS, Grads, LinearHead, Wants
from mtml_kernels.schema.losses import HEAD_KINDS as KINDS

__all__ = ["Problem"]


class Problem:
    """Heads on the same features [N, D], N and D above 0; contiguous copies are made here where they are needed."""

    def __init__(self, features: Tensor, heads: Sequence[LinearHead]) -> None:
        self.heads, self.dtype = list(heads), features.dtype
        self.rows, self.features = features.shape
        sizes: list[int] = []
        options = []
        for h in self.heads:
            ids = h.spec.kind == "cross_entropy" and not h.target.is_floating_point()
            codes = [KINDS.index(h.spec.kind), int(h.spec.reduction == "mean"), int(ids)]
            sizes += [*codes, h.weight.shape[0], h.spec.ignore_index]
            options.append(h.spec.delta if h.spec.kind == "huber" else h.spec.label_smoothing)
        self._heads = engine().LinearHeads(DTYPES[self.dtype], self.rows, self.features, sizes, options)
        tensors = [features, *(t for h in self.heads for t in h.tensors())]
        self._held, self._inputs = checked(self._name, tensors, self.dtype, ids=True)

    def _name(self, i: int) -> str:
        """What the caller calls the i-th tensor."""
        if i == 0:
            return "features"
        head, column = divmod(i - 1, len(TENSORS))
        return f"{TENSORS[column]}[{self.heads[head].place}]"

    def _run(self, method: str, *arguments: Any) -> None:
        module = engine()
        try:
            getattr(self._heads, method)(torch.get_num_threads(), self._inputs, *arguments)
        except module.BadLabel as error:
            at, row, label = map(int, str(error).split())
            h = self.heads[at]
            name = f"targets[{h.place}]"
            message = label_message(name, row, label, h.weight.shape[0], h.spec.ignore_index)
            raise ValueError(message) from None

    def keep(self) -> tuple[Tensor, Tensor]:
        """The losses [H] and the gradients of each at its logits, [N, all heads' classes and padding]."""
        losses = torch.empty(len(self.heads), dtype=self.dtype, device="cpu")
        kept = recycled(self.rows * self._heads.stride(), self.dtype).view(self.rows, -1)
        self._run("keep", losses.data_ptr(), kept.data_ptr())
        return losses, kept

    def _room(self, wanted: Sequence[bool], ts: Sequence[Tensor | None]) -> tuple[Grads, list[int]]:
        room: Grads = []
        for want, t in zip(wanted, ts, strict=True):
            room.append(recycled_like(t) if want and t is not None else None)
        return room, addresses_of(room)

    def _gradients(self, wants: Wants) -> tuple[Tensor | None, Grads, Grads, tuple[int, list[int], list[int]]]:
        (dx,), (at_x,) = self._room([wants.features], [self._held[0]])
        dw, at_w = self._room(wants.weights, [h.weight for h in self.heads])
        db, at_b = self._room(wants.biases, [h.bias for h in self.heads])
        return dx, dw, db, (at_x, at_w, at_b)

    def back(self, kept: Tensor, cotangents: list[float], wants: Wants) -> tuple[Tensor | None, Grads, Grads]:
        """Gradients of sum_h cotangents[h] loss_h at features, weights and biases, from what `keep` kept."""
        dx, dw, db, into = self._gradients(wants)
        self._run("back", kept.data_ptr(), cotangents, *into)
        return dx, dw, db

    def blocks(self, wants: Wants) -> tuple[Tensor, Tensor | None, Grads, Grads]:
        """The losses, and the gradients of their sum, by blocks of rows whose logits are forgotten."""
        losses = torch.empty(len(self.heads), dtype=self.dtype, device="cpu")
        dx, dw, db, into = self._gradients(wants)
        self._run("blocks", losses.data_ptr(), *into)
        return losses, dx, dw, db
