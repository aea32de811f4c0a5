"""What the backends of `linear_multihead_loss` are given, and which gradients they are asked for."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from mtml_kernels.schema.losses import HeadLoss

__all__ = ["TENSORS", "Grads", "LinearHead", "Wants"]

Grads: TypeAlias = list[Tensor | None]

TENSORS = ("weights", "biases", "targets", "sample_weights", "class_weights", "pos_weights")  # of a head, in messages


class LinearHead(NamedTuple):
    """One head; N: the flattened rows. `place` is its own in the call, for messages and results."""

    place: int
    spec: HeadLoss
    weight: Tensor  # [C, D]
    bias: Tensor | None  # [C]
    target: Tensor  # [N] class ids, or [N, C] values ([N, C / 2] for gaussian_nll)
    sample_weights: Tensor | None  # [N]
    class_weights: Tensor | None  # [C]
    pos_weights: Tensor | None  # [C]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of `TENSORS`."""
        return (self.weight, self.bias, self.target, self.sample_weights, self.class_weights, self.pos_weights)


class Wants(NamedTuple):
    """Which gradients are asked for."""

    features: bool
    weights: list[bool]
    biases: list[bool]
