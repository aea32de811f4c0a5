"""What the functional optimizers begin and end with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtml.compat.rate import number
from mtml.compat.torchopt.base import GradientTransformation, transformation
from mtml.compat.torchopt.transform.simple import Scale, ScaleBySchedule, at_least, decay

__all__ = ["Rate", "check_rate", "flip_sign_and_add_weight_decay", "scale_by_neg_lr"]

Rate = float | Tensor | Callable[[Any], Any]

flip_sign_and_add_weight_decay = decay


def check_rate(lr: Any) -> None:
    """Raise for a learning rate that is negative or no number; a schedule is called when steps are taken."""
    if not callable(lr):
        at_least("lr", number(lr))


def scale_by_neg_lr(lr: Rate) -> GradientTransformation:
    """Multiply by -lr: a number, a tensor (read at every step, and differentiated through) or a schedule."""
    check_rate(lr)
    return transformation(ScaleBySchedule(lr, negative=True) if callable(lr) else Scale(number(lr), negative=True))


def _set_use_chain_flat(use_chain_flat: bool) -> None:
    """The original chooses here between two forms with equal results; there is one here."""
