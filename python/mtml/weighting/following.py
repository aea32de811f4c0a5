"""Weightings that follow how the losses fall.

DWA       w = H softmax(r / T),  r_h = L_h(e - 1) / L_h(e - 2), the mean losses of the two epochs before e
GradNorm  G_h = w_h |grad L_h|,  r_h = (L_h / L_h(0)) / mean_j (L_j / L_j(0)),
          the weights' own loss  sum_h |G_h - c_h|,  c_h = mean_j G_j r_h^alpha  a constant;  then sum_h w_h = H again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtml.weighting.base import Weighting
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["DWA", "GradNorm", "takes_gradients"]


class DWA(Weighting):
    """Dynamic weight average: heads whose loss falls slowly weigh more. Call `end_epoch` after every epoch.

    A head has r_h = 1 until it was seen in two epochs; an epoch without it leaves its r_h as it was.

    Args:
        temperature: T, above 0; larger is more even.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> import mtml
        >>> heads = mtml.MultiHead(8, {"a": mtml.Classification(3), "b": mtml.Classification(5)}, "dwa")
        >>> heads.weighting.end_epoch()  # after the epoch's batches
        >>> heads.weighting.weights()
        tensor([1., 1.])

    Paper: Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", 2019 (arXiv:1803.10704).
    """

    means: Tensor
    counts: Tensor
    history: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.register_buffer("means", torch.zeros(len(heads)))  # of this epoch's losses so far
        self.register_buffer("counts", torch.zeros(len(heads)))
        self.register_buffer("history", torch.full((2, len(heads)), torch.nan))  # the epoch before, the one before that

    def weights(self) -> Tensor:
        """[H], the same for a whole epoch."""
        before, earlier = self.history
        ratios = torch.where(before.isnan() | earlier.isnan(), 1.0, before / earlier)
        return len(ratios) * (ratios / self.temperature).softmax(0)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        if self.learning:
            self.counts += present
            step = (losses.detach().to(self.means.dtype) - self.means) / self.counts.clamp(min=1)
            self.means += torch.where(present, step, 0.0)
        return (self.weights().to(losses.dtype) * losses).sum()

    def end_epoch(self) -> None:
        """Let the epoch's mean losses enter the weights."""
        seen = self.counts > 0
        self.history = torch.where(seen, torch.stack([self.means, self.history[0]]), self.history)
        self.means = torch.zeros_like(self.means)
        self.counts = torch.zeros_like(self.counts)


class GradNorm(Weighting):
    """Weights learned so that all heads train at one rate: `weights` [H], a parameter to optimise with the model.

    The total that it returns has two parts with gradients of their own: the weighted losses, in which the weights are
    constants, and the weights' own loss, in which all but the weights is. One backward and one optimiser step serve
    both. The next training call brings the weights back to sum H (none below 0).

    Args:
        alpha: how strongly slow heads are favoured, at least 0.
        shared: tensors at which gradients are measured, e.g. the weight of the last shared layer, for H backward passes
            to there; None: the features given to the heads (one pass through the heads alone).

    Raises:
        ValueError: alpha is negative; when called, features that do not require grad.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Linear(4, 8)
        >>> heads = mtml.MultiHead(8, {"a": mtml.Classification(3), "b": mtml.Regression(2)}, "gradnorm")
        >>> losses = heads.loss(trunk(torch.randn(5, 4)), {"a": torch.tensor([0, 1, 2, 0, 1]), "b": torch.randn(5, 2)})
        >>> losses.total.backward()
        >>> heads.weighting.weights.grad.shape
        torch.Size([2])

    Paper: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks", 2018 (arXiv:1711.02257).
    """

    needs_norms = True
    initial: Tensor

    def __init__(self, alpha: float = 1.5, *, shared: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, least=0)
        self.shared = None if shared is None else tuple(shared)  # in a tuple they stay the trunk's parameters

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.weights = nn.Parameter(torch.ones(len(heads)))
        self.register_buffer("initial", torch.full((len(heads),), torch.nan))  # L(0), the first loss that was seen

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        if not self.learning or norms is None:
            return (self.weights.detach().to(losses.dtype) * losses).sum()
        self.renormalise()
        now = losses.detach().to(self.initial.dtype)
        self.initial = torch.where(self.initial.isnan() & present, now, self.initial)
        weights = self.weights.to(losses.dtype)
        total = (weights.detach() * losses).sum()
        return total + self._own_loss(weights, now / self.initial, norms.to(losses.dtype), present)

    def _own_loss(self, weights: Tensor, ratios: Tensor, norms: Tensor, present: Tensor) -> Tensor:
        """sum_h |G_h - c_h| over the present heads; ratios [H] are L_h / L_h(0)."""
        count = present.sum().clamp(min=1)
        ratios = torch.where(present, ratios, 0.0).to(weights.dtype)
        rates = ratios / (ratios.sum() / count)
        sizes = weights * norms  # G, [H]
        mean = torch.where(present, sizes, 0.0).sum().detach() / count
        own = (sizes - mean * rates**self.alpha).abs()
        return torch.where(present, own, 0.0).sum()

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring the weights back to sum H; the first thing that every training call does."""
        positive = self.weights.clamp(min=0)
        # a new tensor, not in place: graphs of earlier calls keep the weights that they were made with
        total = positive.sum()
        self.weights.data = torch.where(total > 0, positive * (len(positive) / total), 1.0)


def takes_gradients() -> None:
    """Where a graph of torch.compile ends; an error where one graph was asked for."""


takes_gradients._torchdynamo_disable = True  # type: ignore[attr-defined]
takes_gradients._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "the weighting takes gradients itself, as 'gradnorm' does, and no graph does that. Way out: another weighting, or "
    "torch.compile without fullgraph=True"
)
