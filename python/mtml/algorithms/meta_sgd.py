"""Meta-SGD: MAML whose inner learning rates are learned, one for every element of every parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtml.algorithms.maml import MAML
from mtml.inner_lr import InnerLR
from mtml_kernels.batch_norm import per_step_batch_norm
from mtml_kernels.checks import check_steps

__all__ = ["MetaSGD"]


class MetaSGD(MAML):
    """`MAML` with ``InnerLR(model, lr, per="element")``: initialisation, direction and rate are all meta-learned.

    Args:
        model, first_order and the keyword arguments: as for `MAML`.
        lr: where every rate starts, or an InnerLR to use.

    Raises:
        ValueError, TypeError: as `MAML`.

    Example:
        >>> import torch, mtml
        >>> sgd = mtml.MetaSGD(torch.nn.Linear(2, 1), lr=0.1, steps=2, loss="mse")
        >>> len(list(sgd.parameters()))
        4
        >>> x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
        >>> sgd.meta_loss(x, y, x, y).mean().backward()
        >>> all(p.grad is not None for p in sgd.parameters())
        True

    Paper: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | InnerLR = 0.01,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        **options: Any,
    ) -> None:
        if options.get("batch_norm") == "per_step":  # first, because rows for the steps get no rates
            model = per_step_batch_norm(model, check_steps(options.get("steps", 1)))
        # without params= a rate for every parameter, with it for those that are adapted
        rates = lr if isinstance(lr, InnerLR) else InnerLR(model, lr, per="element", params=options.get("params"))
        super().__init__(model, rates, first_order, allow_unused, allow_nograd, **options)

    @property
    def lrs(self) -> list[Tensor]:
        """The rates in the order of the parameters, [*shape] each (or [K, *shape] where there is one per step)."""
        assert isinstance(self.lr, InnerLR)
        return list(self.lr.as_dict().values())
