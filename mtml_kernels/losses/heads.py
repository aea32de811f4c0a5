"""Head losses: what the multi-head kernels compute for one head, with which options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

__all__ = ["CLASS_KINDS", "KINDS", "HeadLoss", "rows_shape"]

KINDS = ("cross_entropy", "bce_with_logits", "mse", "l1", "huber", "gaussian_nll", "kl")
CLASS_KINDS = frozenset({"cross_entropy", "kl"})  # a softmax over the class dimension
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The loss of one head.

    ============== ================================ ==========================================
    kind           logits                           target
    ============== ================================ ==========================================
    cross_entropy  [N, C, ...] (or [..., C])        class ids [N, ...], or probabilities like logits
    kl             [N, C, ...] (or [..., C])        probabilities like logits: KL(target || softmax)
    bce_with_logits, mse, l1, huber  [N, ...]       like logits
    gaussian_nll   [N, ..., 2 O]: mean, log variance  [N, ..., O]  (Kendall, Gal 2017, arXiv:1703.04977)
    ============== ================================ ==========================================

    Args:
        kind: one of the above.
        reduction: "mean" over what counts (see `reference.multihead_loss`), or "sum".
        ignore_index: class id whose rows count for nothing (cross_entropy with ids).
        label_smoothing: in [0, 1] (cross_entropy).
        delta: where huber turns linear, above 0.
        class_dim: where the classes lie, 1 (per-pixel: [N, C, H, W]) or -1 (per-token: [N, L, V]).

    Raises:
        ValueError: an unknown kind or reduction, or an option outside its range.

    Example:
        >>> HeadLoss("cross_entropy", ignore_index=0).kind
        'cross_entropy'
    """

    kind: str = "cross_entropy"
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    delta: float = 1.0
    class_dim: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kinds: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"kinds: expected reduction 'mean' or 'sum', got {self.reduction!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"kinds: expected label_smoothing between 0 and 1, got {self.label_smoothing}")
        if not self.delta > 0.0:
            raise ValueError(f"kinds: expected delta above 0, got {self.delta}")
        if self.class_dim not in (1, -1):
            raise ValueError(f"kinds: expected class_dim 1 or -1, got {self.class_dim}")

    @staticmethod
    def of(value: str | HeadLoss) -> HeadLoss:
        """A head loss from its kind's name, or itself.

        Raises:
            TypeError: neither a name nor a HeadLoss.
        """
        if isinstance(value, HeadLoss):
            return value
        if isinstance(value, str):
            return HeadLoss(value)
        raise TypeError(f"kinds: expected a name or a HeadLoss, got {type(value).__name__}")


def rows_shape(spec: HeadLoss, logits: Tensor) -> Sequence[int]:
    """The shape of what is weighed one by one: without the class dimension for softmax kinds, else [N]."""
    if spec.kind not in CLASS_KINDS:
        return logits.shape[:1]
    dim = spec.class_dim % logits.ndim
    return (*logits.shape[:dim], *logits.shape[dim + 1 :])
