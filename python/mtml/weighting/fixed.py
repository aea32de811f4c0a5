"""Weightings without memory: fixed weights, random weights, the geometric mean.

Fixed  sum_h w_h L_h
RLW    sum_h w_h L_h,  w = softmax(z) over the present heads, z ~ N(0, I) anew in every call
GLS    (prod_h L_h)^(1 / n) over the n present heads
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtml.weighting.base import Weighting, by_head, checked, share_among
from mtml.weighting.counted import counted_normal
from mtml_kernels.checks import check_steps

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["GLS", "RLW", "Fixed"]


class Fixed(Weighting):
    """The sum of the losses, each times a constant.

    Args:
        weights: {head: weight}, finite and at least 0; heads that are not named have 1.

    Raises:
        ValueError: a weight that is negative or not finite, or (when bound) a name that is no head.

    Example:
        >>> import torch, mtml
        >>> heads = {"depth": mtml.Regression(1), "seg": mtml.Classification(3)}
        >>> mtml.MultiHead(8, heads, weighting=mtml.weighting.Fixed({"depth": 0.5})).weighting.weights
        tensor([0.5000, 1.0000])
    """

    weights: Tensor

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.given = checked("weights", weights, least=0)

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.register_buffer("weights", by_head("weights", self.given, heads, 1.0), persistent=False)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        return (self.weights.to(losses.dtype) * losses).sum()


class RLW(Weighting):
    """Random weights that sum to 1, drawn anew in every training call; the mean of the present heads in eval.

    The n-th call's weights depend on the seed and n alone, and the state_dict has n.

    Args:
        seed: of the draws.

    Raises:
        TypeError, ValueError: a seed that is no whole number of at least 0.

    Example:
        >>> import torch
        >>> rlw = RLW(seed=1)
        >>> rlw(torch.ones(3), torch.ones(3, dtype=torch.bool))
        tensor(1.)

    Paper: Lin, Ye, Zhang, Tsang, "Reasonable Effectiveness of Random Weighting", 2022 (arXiv:2111.10603).
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = check_steps(seed, "seed")
        self._draws = torch.zeros((), dtype=torch.int64)  # a tensor, for a number would be a constant of a graph

    @property
    def draws(self) -> int:
        """How many weights were drawn."""
        return int(self._draws)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        scores = torch.zeros(losses.shape)
        if self.learning:
            scores = counted_normal(self.seed, self._draws, losses.shape[0])
            self._draws += 1
        return (share_among(present, scores.to(losses.device, losses.dtype)) * losses).sum()

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws}

    def set_extra_state(self, state: Any) -> None:
        self.seed = state["seed"]
        self._draws.fill_(state["draws"])


class GLS(Weighting):
    """The geometric mean of the losses, which must not be negative (NaN comes of one that is: gaussian_nll's may be).

    Example:
        >>> import torch
        >>> GLS()(torch.tensor([2.0, 8.0, 0.0]), torch.tensor([True, True, False]))
        tensor(4.)

    Paper: Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning", 2019 (arXiv:1904.08492).
    """

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        count = present.sum()
        # through logarithms, for a product of many losses leaves the range of float32
        mean = torch.where(present, losses, 1.0).log().sum() / count.clamp(min=1)
        return torch.where(count > 0, mean.exp(), 0.0)
