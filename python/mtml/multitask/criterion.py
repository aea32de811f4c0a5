"""A head's loss as the inner loop takes it: the engine's own where it has it, else the heads' specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtml.multihead.heads import HeadLayer
from mtml.multitask.features import as_rows
from mtml_kernels.losses import IGNORED, LossSpec
from mtml_kernels.reference.multihead_loss import head_loss

__all__ = ["HeadCriterion", "fused_criterion", "fused_targets", "packed"]

_NO_CLASS = -1  # which the engine refuses, as it does every id out of range


class HeadCriterion:
    """The loss of any head for one task: (prediction [N, ...], {"target": ..., "weights": one a row}) -> a scalar."""

    def __init__(self, layer: HeadLayer, rows: bool) -> None:
        self.layer, self.rows = layer, rows  # rows: the prediction is [R, C] already

    @property
    def __name__(self) -> str:
        return f"{self.layer.head.spec.kind} of {type(self.layer.head).__name__}"

    def __call__(self, prediction: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        head, target, weights = self.layer.head, given["target"], given["weights"]
        if not self.rows:
            floating = target.is_floating_point()
            prediction = as_rows(head, prediction[None])[0]
            target = as_rows(head, target[None])[0] if floating else target.flatten()
        weights = weights.flatten()
        prediction = prediction.to(weights.dtype)  # under autocast, for losses are not for half precision
        return head_loss(prediction, target, head.spec, weights, self.layer.class_weights, self.layer.pos_weight)


def fused_criterion(layer: HeadLayer) -> LossSpec | None:
    """The inner loop's own loss of this head; None where it has none.

    Class weights and another ignored id than -100 are brought into targets and masks by `fused_targets`.
    """
    spec = layer.head.spec
    smoothed = layer.class_weights is not None and spec.label_smoothing > 0
    if spec.info.code is None or layer.pos_weight is not None or smoothed:
        return None
    return LossSpec(spec.kind, spec.reduction, spec.label_smoothing, spec.delta)


def fused_targets(layer: HeadLayer, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets and mask, a row each, under which `fused_criterion` is the head's loss.

    With class weights c a row of id y counts c_y: sum(w c_y l) / sum(w c_y). Probabilities t become c t, and the row
    counts as before.
    """
    weights = layer.class_weights
    if y.is_floating_point():
        return (y if weights is None else y * weights), mask
    y = y.long()
    ignored = y == layer.head.spec.ignore_index
    if weights is not None:
        own = weights[y.masked_fill(ignored, 0).clamp(0, len(weights) - 1)]  # the engine names a label out of range
        mask = own if mask is None else mask.to(own.dtype) * own
    if layer.head.spec.ignore_index != IGNORED:
        y = y.masked_fill(y == IGNORED, _NO_CLASS).masked_fill(ignored, IGNORED)
    return y, mask


def packed(target: Tensor, weights: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What `HeadCriterion` takes as a target."""
    return {"target": target, "weights": weights.to(dtype)}
