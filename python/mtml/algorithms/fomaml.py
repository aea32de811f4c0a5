"""FOMAML: first-order MAML."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from mtml.algorithms.learner import LearnerOptions, Rate
from mtml.algorithms.maml import MAML
from mtml.params import ParamsArg

__all__ = ["FOMAML"]


class FOMAML(MAML):
    """``MAML(first_order=True)``: inner gradients count as constants, d theta_K / d theta_0 = I.

    The meta-gradient is the query loss's gradient at theta_K: grad L_q(theta_K). It is an approximation, at about half
    the cost. Arguments and errors as of `MAML`.

    Example:
        >>> import torch, mtml
        >>> maml = mtml.FOMAML(torch.nn.Linear(2, 1), lr=0.1, steps=3, loss="mse")
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> maml.meta_loss(x, y, x, y).mean().backward()

    Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017, section 5.2.
    """

    def __init__(
        self, model: nn.Module, lr: Rate, *, params: ParamsArg = None, **options: Unpack[LearnerOptions]
    ) -> None:
        super().__init__(model, lr, True, params=params, **options)
