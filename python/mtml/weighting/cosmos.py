"""COSMOS: a weighted sum whose losses are drawn to the ray of the preferences.

total = sum_h r_h L_h - penalty <r, L> / (|r| |L|),  the preferences r (of sum 1) over the present heads
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml.weighting.base import Weighting, checked, preferences_of, preferred
from mtml_kernels.checks import check_in_graph, check_number, shown

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["COSMOS"]


WANTED = "expected finite numbers of at least 0, one of them above 0"


class COSMOS(Weighting):
    """The preferred sum of the losses, less a reward for losses that are in proportion to the preferences.

    The paper trains one model for every trade-off: it draws preferences for every batch, as the example does, and gives
    them to the model as a further input.

    Args:
        penalty: lambda, at least 0; the paper has 0.01 to 8.
        preferences: {head: r}, at least 0, brought to sum 1 over the present heads; heads that are not named have 1.

    Raises:
        TypeError: a penalty or preference that is no number.
        ValueError: one that is negative or not finite; (when bound) a name that is no head, preferences that are all 0.

    Example:
        >>> import torch, mtml
        >>> heads = mtml.MultiHead(10, {"a": mtml.Classification(3), "b": mtml.Regression(2)}, "cosmos")
        >>> r = heads.weighting.prefer(torch.distributions.Dirichlet(torch.ones(2)).sample())
        >>> features = torch.cat([torch.randn(5, 8), r.expand(5, 2)], 1)
        >>> losses = heads.loss(features, {"a": torch.tensor([0, 1, 2, 0, 1]), "b": torch.randn(5, 2)})
        >>> losses.total.backward()

    Paper: Ruchte, Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", 2021
    (arXiv:2103.13392).
    """

    preferences: Tensor

    def __init__(self, penalty: float = 1.0, *, preferences: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.penalty = check_number("penalty", penalty, least=0)
        self.given = checked("preferences", preferences, least=0)

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.register_buffer("preferences", preferences_of(self.given, heads))

    @torch.no_grad()
    def prefer(self, preferences: Tensor) -> Tensor:
        """Take preferences [H], at least 0 and not all 0, from now on; they come back on the weighting's device.

        They need no sum of 1, to which every call brings those of the heads that are present.

        Raises:
            ValueError: another shape; a preference that is negative or not finite; none above 0. The ones before stay.
        """
        if not isinstance(preferences, Tensor) or preferences.shape != self.preferences.shape:
            raise ValueError(
                f"preferences: expected [{len(self.preferences)}], one a head ({', '.join(self.names)}), got "
                f"{shown(preferences)}"
            )
        fine = (preferences >= 0).all() & torch.isfinite(preferences).all() & (preferences > 0).any()
        if is_compiling():
            check_in_graph(fine, f"preferences: {WANTED}")
        elif not fine:
            raise ValueError(f"preferences: {WANTED}, got {preferences.tolist()} for {', '.join(self.names)}")
        return self.preferences.copy_(preferences).clone()

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        r = preferred(self.preferences, present).to(losses.dtype)
        product = (r * losses).sum()
        lengths = torch.linalg.vector_norm(r) * torch.linalg.vector_norm(losses)
        return product - self.penalty * product / lengths.clamp(min=torch.finfo(losses.dtype).tiny)
