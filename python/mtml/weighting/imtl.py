"""Loss balance of impartial multi-task learning.

With a scale s_h for every head, learned beside the model,
    total = sum_h exp(s_h) L_h - s_h
Where the s_h are at their best for the losses seen, every exp(s_h) L_h is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtml.weighting.base import Weighting

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["IMTLL"]


class IMTLL(Weighting):
    """IMTL-L: weights from learned scales, `scales` [H], a parameter to optimise with the model.

    They bring all losses, which must be above 0, to one size. With IMTL-G for the shared parameters
    (``mtml.balance.backward(..., method="imtl_g")``) on the heads' losses this is the paper's IMTL.

    Example:
        >>> import mtml
        >>> heads = mtml.MultiHead(8, {"depth": mtml.Regression(1), "seg": mtml.Classification(3)}, "imtl_l")
        >>> heads.weighting.scales.shape
        torch.Size([2])

    Paper: Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", 2021 (ICLR).
    """

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.scales = nn.Parameter(torch.zeros(len(heads)))

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        s = self.scales.to(losses.dtype)
        return torch.where(present, s.exp() * losses - s, 0.0).sum()
