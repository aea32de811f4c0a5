"""Smooth Tchebycheff scalarisation.

total = mu log sum_h exp(w_h (L_h - z_h) / mu),  the sum and the preferences w (of sum 1) over the present heads

As mu falls to 0 this comes down to max_h w_h (L_h - z_h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtml.weighting.base import Weighting, by_head, checked, preferences_of, preferred
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["STCH"]


class STCH(Weighting):
    """The smooth maximum of the losses: the worst head weighs most, all the more the smaller `mu` is.

    Args:
        mu: the smoothing, above 0; the paper has 0.01 to 1.
        preferences: {head: w}, at least 0, brought to sum 1 over the present heads; heads that are not named have 1.
        ideal: {head: z}, the best loss that a head can have; heads that are not named have 0.

    Raises:
        TypeError: what is no number.
        ValueError: mu is not above 0, a preference is negative, a number is not finite; (when bound) a name is no head,
            all preferences are 0.

    Example:
        >>> import torch, mtml
        >>> heads = {"depth": mtml.Regression(1), "seg": mtml.Classification(3)}
        >>> worst = mtml.MultiHead(8, heads, weighting=mtml.weighting.STCH(mu=1e-3)).weighting
        >>> worst(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))  # half of 3
        tensor(1.5000)

    Paper: Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", 2024
    (arXiv:2402.19078).
    """

    preferences: Tensor
    ideal: Tensor

    def __init__(
        self,
        mu: float = 0.1,
        *,
        preferences: Mapping[str, float] | None = None,
        ideal: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.mu = check_number("mu", mu, above=0)
        self.given = checked("preferences", preferences, least=0), checked("ideal losses", ideal)

    def setup(self, heads: Mapping[str, Head]) -> None:
        preferences, ideal = self.given
        self.register_buffer("preferences", preferences_of(preferences, heads), persistent=False)
        self.register_buffer("ideal", by_head("ideal losses", ideal, heads, 0.0), persistent=False)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        weights = preferred(self.preferences, present).to(losses.dtype)
        scores = weights * (losses - self.ideal.to(losses.dtype)) / self.mu
        anyone = present.any()
        # where nobody is there all count, for the gradient of a maximum of nothing is NaN
        total = self.mu * scores.masked_fill(~present & anyone, -math.inf).logsumexp(0)
        return torch.where(anyone, total, 0.0)
