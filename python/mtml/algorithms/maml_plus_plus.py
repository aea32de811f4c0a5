"""MAML++: MAML with what makes its training stable."""

from __future__ import annotations

import dataclasses
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from mtml.algorithms.base import CallOptions, MetaOutput
from mtml.algorithms.learner import LearnerOptions
from mtml.algorithms.maml import MAML
from mtml.inner_lr import InnerLR
from mtml.params import ParamsArg
from mtml_kernels.batch_norm import per_step_batch_norm
from mtml_kernels.checks import check_number, check_steps

__all__ = ["MAMLPlusPlus", "multi_step_weights"]


def multi_step_weights(steps: int, epoch: float, epochs: float) -> list[float] | None:
    """The weights of the query losses after each of K steps at this epoch of the multi-step loss's `epochs`.

    All are 1 / K at first; those but the last fall linearly, to 0.03 / K at least, and the last takes what they lose.
    None, the last loss alone, once the epochs are over.

    Example:
        >>> multi_step_weights(4, epoch=5, epochs=10)
        [0.125, 0.125, 0.125, 0.625]
    """
    if epoch >= epochs or steps < 2:
        return None
    equal = 1.0 / steps
    weight = max(equal * (1.0 - epoch / epochs), 0.03 * equal)
    return [weight] * (steps - 1) + [1.0 - weight * (steps - 1)]


@dataclasses.dataclass
class Annealing:
    """What changes as a `MAMLPlusPlus` is trained. In an object of its own, so that paths outlive an epoch."""

    multi_step_epochs: float
    first_order_epochs: float
    epoch: float = 0.0


class MAMLPlusPlus(MAML):
    """`MAML` with the five changes of "How to train your MAML" that are switched on together:

    - a learned rate for every tensor and step (LSLR): an `InnerLR`, which may be given as `lr`;
    - batch normalisation by batch statistics with a learned weight and bias for every step (BNRS, BNWB): the model's
      BatchNorm layers become `PerStepBatchNorm`, as by ``batch_norm="per_step"``;
    - the multi-step loss (MSL), sum_k v_k L_q(theta_k), its weights annealed to the last step by `multi_step_weights`;
    - first order in the first epochs, exact second order after them (DA);
    - an outer rate that falls along a cosine (CA): `cosine`.

    ``learner.epoch``, 0 at first, says where the training is: set it as the training goes on, whole or in fractions. It
    decides in train mode alone; in eval mode, and in `adapt_tasks`, the last step's loss counts, to exact second order.

    Args:
        model, params and the keyword arguments: as of `MAML`; per_step is `batch_norm`'s default here.
        lr: where every rate starts, or an InnerLR to use.
        multi_step_epochs: how long the losses after all steps count; 0 for never.
        first_order_epochs: how long the meta-gradient is first order; 0 for never. The paper takes 50.
        steps: K, 5 by default.

    Raises:
        ValueError, TypeError: as `MAML`; epochs below 0.

    Example:
        >>> import torch, mtml
        >>> layers = torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        >>> learner = mtml.MAMLPlusPlus(torch.nn.Sequential(*layers), multi_step_epochs=10, first_order_epochs=1)
        >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
        >>> schedule = learner.cosine(optimizer, epochs=30, floor=1e-5)
        >>> x, y = torch.randn(4, 6, 2), torch.randint(3, (4, 6))
        >>> for learner.epoch in range(30):
        ...     optimizer.zero_grad()
        ...     learner.meta_loss(x, y, x, y).mean().backward()
        ...     optimizer.step()
        ...     schedule.step()

    Paper: Antoniou, Edwards, Storkey, "How to train your MAML", 2019 (arXiv:1810.09502).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | InnerLR = 0.1,
        *,
        multi_step_epochs: float = 10.0,
        first_order_epochs: float = 0.0,
        params: ParamsArg = None,
        **options: Unpack[LearnerOptions],
    ) -> None:
        for name, epochs in (("multi_step_epochs", multi_step_epochs), ("first_order_epochs", first_order_epochs)):
            check_number(name, epochs, least=0)
        steps = check_steps(options.get("steps", 5))
        options = {"batch_norm": "per_step", **options, "steps": steps}
        if options["batch_norm"] == "per_step":  # first, because rows for the steps get no rates
            model = per_step_batch_norm(model, steps)
        rates = lr if isinstance(lr, InnerLR) else InnerLR(model, lr, per="tensor", steps=max(steps, 1), params=params)
        super().__init__(model, rates, params=params, **options)
        self.annealing = Annealing(float(multi_step_epochs), float(first_order_epochs))

    @property
    def epoch(self) -> float:
        """Where the training is, in epochs."""
        return self.annealing.epoch

    @epoch.setter
    def epoch(self, value: float) -> None:
        self.annealing.epoch = float(value)

    def meta_forward(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> MetaOutput:
        """As `MAML.meta_forward`; step_weights and first_order that are not given follow the epoch in train mode."""
        return super().meta_forward(sx, sy, qx, qy, **self._scheduled(options))

    def task_gradients(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> dict[str, Tensor]:
        """As `MAML.task_gradients`, of the loss that `meta_loss` gives now."""
        return super().task_gradients(sx, sy, qx, qy, **self._scheduled(options))

    def cosine(self, optimizer: Optimizer, epochs: int, floor: float = 0.0) -> CosineAnnealingLR:
        """The outer schedule: the rate falls from the optimizer's own to `floor` along half a cosine."""
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, floor)

    def _scheduled(self, options: CallOptions) -> CallOptions:
        if not self.training:
            return options
        found = options.copy()
        if found.get("step_weights") is None and not found.get("query_steps"):
            steps = found.get("steps")
            steps = self.steps if steps is None else check_steps(steps)
            found["step_weights"] = multi_step_weights(steps, self.epoch, self.annealing.multi_step_epochs)
        if found.get("first_order") is None:
            found["first_order"] = self.epoch < self.annealing.first_order_epochs
        return found
