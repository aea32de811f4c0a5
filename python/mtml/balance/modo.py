"""MoDo: MGDA's weights followed from step to step, without bias, by products of two independent batches' gradients.

w <- the point of the simplex {w >= 0, sum w = 1} nearest to  w - gamma (J_1 J_2' w + rho w),  rows of J_b: gradients
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtml.balance.affinity import products_of
from mtml.balance.gradients import Losses, Shared, gradients
from mtml.balance.remembering import Remembering
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["MoDo"]


class MoDo(Remembering):
    """Multi-objective descent with double sampling, for `mtml.balance.backward`; `weights` [H] are even at the start.

    `update` moves the weights by two batches; then `backward` takes a further batch, or the mean of the two, by them.

    Args:
        losses: H, at least 1.
        gamma: the weights' rate, above 0. rho: what pulls them to even ones, at least 0.

    Raises:
        ValueError: a number outside its range; when used, another number of losses.
        RuntimeError: backward before the first update.

    Example:
        >>> import torch, mtml
        >>> trunk, modo = torch.nn.Linear(4, 8), mtml.balance.MoDo(2)
        >>> heads = mtml.MultiHead(8, {"a": mtml.Classification(3), "b": mtml.Regression(2)})
        >>> def losses():  # of a batch drawn anew
        ...     return heads.loss(trunk(torch.randn(5, 4)), {"a": torch.randint(3, (5,)), "b": torch.randn(5, 2)})
        >>> modo.update(losses(), losses(), shared=trunk.parameters())
        >>> mtml.balance.backward(losses(), method=modo, shared=trunk.parameters()).weights.sum().round()
        tensor(1., dtype=torch.float64)

    Paper: Chen, Fernando, Ying, Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
    and Conflict-Avoidance", 2023 (arXiv:2305.20057).
    """

    weights: Tensor
    updates: Tensor

    def __init__(self, losses: int, gamma: float = 0.1, rho: float = 0.0) -> None:
        super().__init__(losses)
        self.gamma, self.rho = check_number("gamma", gamma, above=0), check_number("rho", rho, least=0)
        self.register_buffer("weights", torch.full((losses,), 1 / losses, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def update(self, first: Losses, second: Losses, *, shared: Shared) -> None:
        """Move the weights by the gradients of two independent batches' losses at shared parameters.

        A loss without gradient in either batch keeps its weight. Gradients that are not finite move nothing.

        Args:
            first, second: as for `gram`; made with the same parameters. shared: parameters, as for `gram`; not
                features, for those of two batches have nothing to do with each other.
        """
        shared = [shared] if isinstance(shared, Tensor) else list(shared or ())
        rows = [gradients(losses, shared, with_own=False).rows for losses in (first, second)]
        products = products_of(*rows).cpu().numpy()
        self.check(products)
        present = products_of(rows[0], rows[0]).diagonal() * products_of(rows[1], rows[1]).diagonal() > 0
        self.updates += 1
        if np.isfinite(products).all():
            self._move(products, present.cpu().numpy())

    @torch.no_grad()
    def weigh(self, gram: Array) -> Array:
        self.check(gram)
        if not self.updates:
            raise RuntimeError(
                "method: expected a MoDo that has seen two batches, got a new one; call its update(first, second, "
                "shared=...) before every backward"
            )
        weights: Array = self.weights.double().cpu().numpy() * (np.diagonal(gram) > 0)
        return weights

    def reset(self) -> None:
        """Even weights again, as before the first update."""
        self.weights.fill_(1 / self.losses)
        self.updates.zero_()

    def _move(self, products: Array, present: Array) -> None:
        weights = self.weights.double().cpu().numpy().copy()
        slope = products @ weights + self.rho * weights
        share = weights[present].sum()
        weights[present] = _nearest(weights[present] - self.gamma * slope[present], share)
        self.weights.copy_(torch.from_numpy(weights))


def _nearest(point: Array, total: float) -> Array:
    """The point nearest to this one of those of at least 0 and of sum `total`: all less one number, then clipped."""
    if not len(point):
        return point
    falling = np.sort(point)[::-1]
    levels = (np.cumsum(falling) - total) / np.arange(1, len(point) + 1)
    level = levels[np.flatnonzero(falling >= levels)[-1]]  # with as many as stay above it
    nearest: Array = (point - level).clip(min=0)
    return nearest
