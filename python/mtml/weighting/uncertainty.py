"""Homoscedastic uncertainty as loss weights.

With a log variance s_h = log sigma_h^2 for every head, learned beside the model,
    total = sum_h a_h exp(-s_h) L_h + s_h / 2        a_h = 1/2 for the squared error, 1 for the other losses

For "mse" it is the negative logarithm of a Gaussian likelihood, up to a constant. "huber" and "gaussian_nll" hold the
half of the square themselves: huber of a large delta weighs as mse does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtml.weighting.base import Weighting
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["Uncertainty"]


class Uncertainty(Weighting):
    """Weights from learned log variances, `log_vars` [H], a parameter to optimise with the model.

    Args:
        init: every log variance at the start.

    Raises:
        TypeError, ValueError: init is no finite number.

    Example:
        >>> import mtml
        >>> heads = mtml.MultiHead(8, {"depth": mtml.Regression(1), "seg": mtml.Classification(3)}, "uncertainty")
        >>> heads.weighting.log_vars.shape
        torch.Size([2])

    Paper: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", 2018 (arXiv:1705.07115).
    """

    factors: Tensor

    def __init__(self, init: float = 0.0) -> None:
        super().__init__()
        self.init = check_number("init", init)

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.log_vars = nn.Parameter(torch.full((len(heads),), self.init))
        factors = torch.tensor([0.5 if head.spec.kind == "mse" else 1.0 for head in heads.values()])
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        s = self.log_vars.to(losses.dtype)
        each = self.factors.to(losses.dtype) * torch.exp(-s) * losses + s / 2
        return torch.where(present, each, 0.0).sum()
