"""The compiled linear heads: their losses, and the gradients at features, weights and biases, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels import native
from mtml_kernels.losses.heads import KINDS, HeadLoss
from mtml_kernels.native.multihead_loss import label_message, recycled, recycled_like

__all__ = ["LinearHead", "Problem"]

Grads = list[Tensor | None]


_NAMES = ("weights", "biases", "targets", "sample_weights", "class_weights", "pos_weights")


class LinearHead(NamedTuple):
    """One head: weight [C, D], bias [C]; of the flattened rows target, sample weights [N]; class and pos weights [C].

    `place` is its own in the call, for messages and results.
    """

    place: int
    spec: HeadLoss
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    sample_weights: Tensor | None
    class_weights: Tensor | None
    pos_weights: Tensor | None


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
        code = 0 if self.dtype == torch.float32 else 1
        self._heads = native._engine().LinearHeads(code, self.rows, self.features, sizes, options)
        tensors: list[Tensor | None] = [features]
        for h in self.heads:
            tensors += h[2:]
        self._held, self._inputs = native.addresses_of(self._name, tensors, self.dtype, ids=True)

    def _name(self, i: int) -> str:
        """What the caller calls the i-th tensor."""
        if i == 0:
            return "features"
        head, column = divmod(i - 1, len(_NAMES))
        return f"{_NAMES[column]}[{self.heads[head].place}]"

    def _run(self, method: str, *arguments: Any) -> None:
        engine = native._engine()
        try:
            getattr(self._heads, method)(torch.get_num_threads(), self._inputs, *arguments)
        except engine.BadLabel as error:
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
        return room, [0 if t is None else t.data_ptr() for t in room]

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


class Wants(NamedTuple):
    """Which gradients are asked for."""

    features: bool
    weights: list[bool]
    biases: list[bool]
