"""FAMO: weights under which all losses fall at one rate, learned from the losses alone.

total  c sum_h z_h log(L_h - b_h),  z = softmax(x),  c = 1 / sum_h z_h / (L_h - b_h) a constant:
       its gradient is a convex combination of the heads' gradients
x      one step of Adam along  J' d + decay x,  J = dz/dx,  d_h = log(L_h - b_h) before the model's step - after it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtml.head_losses import HeadLosses
from mtml.weighting.base import Weighting, by_head, checked, share_among
from mtml_kernels.checks import check_number, shown

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["FAMO"]

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's own


class FAMO(Weighting):
    """Weights [H] that follow how fast each loss fell in the last step: call `update` after every optimizer step.

    Without these calls the weights stay even. A head moves only where it was present before and after the step.

    Args:
        lr: of the weights' own Adam, at least 0. decay: what pulls their logits to 0, at least 0.
        lower: {head: b}, what its losses always stay above, for NaN comes of one that does not; heads that are not
            named have 0.

    Raises:
        ValueError: a rate or decay that is negative, a number that is not finite; (when bound) a name that is no head.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Linear(4, 8)
        >>> heads = mtml.MultiHead(8, {"a": mtml.Classification(3), "b": mtml.Regression(2)}, "famo")
        >>> optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 0.1)
        >>> x, targets = torch.randn(5, 4), {"a": torch.tensor([0, 1, 2, 0, 1]), "b": torch.randn(5, 2)}
        >>> heads.loss(trunk(x), targets).total.backward()
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     heads.weighting.update(heads.loss(trunk(x), targets))  # the same batch once more
        >>> heads.weighting.weights().sum()
        tensor(1.)

    Paper: Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", 2023 (arXiv:2306.03792).
    """

    lower: Tensor
    logits: Tensor
    before: Tensor
    steps: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, lr: float = 0.025, decay: float = 1e-3, *, lower: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.lr, self.decay = check_number("lr", lr, least=0), check_number("decay", decay, least=0)
        self.given = checked("lower bounds", lower)

    def setup(self, heads: Mapping[str, Head]) -> None:
        self.register_buffer("lower", by_head("lower bounds", self.given, heads, 0.0), persistent=False)
        self.register_buffer(
            "before", torch.full((len(heads),), torch.nan)
        )  # L - b at the last total, NaN where absent
        for name in ("logits", "steps", "mean", "square"):  # the last three are Adam's, its steps by head
            self.register_buffer(name, torch.zeros(len(heads)))

    def weights(self) -> Tensor:
        """z [H], of sum 1, with all heads present."""
        return self.logits.softmax(0)

    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        above = torch.where(present, losses - self.lower.to(losses.dtype), 1.0)
        now = above.detach()
        if self.learning:
            self.before.copy_(torch.where(present, now, torch.nan))
        shares = share_among(present, self.logits.to(losses.dtype))
        scale = 1 / (shares / now).sum().clamp(min=torch.finfo(now.dtype).tiny)
        return (scale * shares * above.log()).sum()

    @torch.no_grad()
    def update(self, losses: HeadLosses | Mapping[str, Tensor] | Tensor) -> None:
        """Learn from the losses of the same batch after the optimizer's step.

        Args:
            losses: what `MultiHead.loss` gives under ``torch.no_grad()``, its per_head, or [H]; 0 where absent.

        Raises:
            ValueError: losses with a graph (making them has counted as the next step's beginning), of other heads, or
                of another shape.
        """
        now = self._checked(losses)
        change = self.before.log() - (now - self.lower).log()
        moved = (now != 0) & change.isfinite()
        shares = share_among(moved, self.logits)
        change = torch.where(moved, change, 0.0)
        self._adam(shares * (change - (shares * change).sum()) + self.decay * self.logits, moved)
        self.before.fill_(torch.nan)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything: the weights are even again."""
        self.before.fill_(torch.nan)
        for buffer in (self.logits, self.steps, self.mean, self.square):
            buffer.zero_()

    def _adam(self, slope: Tensor, moved: Tensor) -> None:
        """Kingma, Ba, 2015 (arXiv:1412.6980), for the heads that moved alone."""
        steps = self.steps + 1
        mean = BETAS[0] * self.mean + (1 - BETAS[0]) * slope
        square = BETAS[1] * self.square + (1 - BETAS[1]) * slope**2
        length = (square / (1 - BETAS[1] ** steps)).sqrt() + EPS
        logits = self.logits - self.lr * mean / (1 - BETAS[0] ** steps) / length
        for buffer, value in (
            (self.steps, steps), (self.mean, mean), (self.square, square), (self.logits, logits),
        ):  # fmt: skip
            buffer.copy_(torch.where(moved, value, buffer))

    def _checked(self, losses: HeadLosses | Mapping[str, Tensor] | Tensor) -> Tensor:
        """Losses [H], without graph, in the buffers' dtype."""
        given = losses.per_head if isinstance(losses, HeadLosses) else losses
        if isinstance(given, Mapping) and tuple(given) != self.names:
            raise ValueError(f"losses: expected those of {', '.join(self.names)}, got {', '.join(given) or 'none'}")
        parts = list(given.values()) if isinstance(given, Mapping) else [given]
        if not all(isinstance(part, Tensor) for part in parts) or sum(part.numel() for part in parts) != len(
            self.names
        ):
            raise ValueError(f"losses: expected [{len(self.names)}], one a head, got {shown(given)}")
        if any(part.requires_grad for part in parts):
            raise ValueError(
                "losses: expected those after the optimizer's step, made under torch.no_grad(), got some with a graph"
            )
        return torch.cat([part.reshape(-1) for part in parts]).to(self.before)
