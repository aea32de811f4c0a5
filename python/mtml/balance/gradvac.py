"""Gradient Vaccine: gradients whose cosine falls below what it was on average are turned towards each other.

For every i and the other j in random order, c the cosine of the original g_j and of g_i as it is by then, a = a_ij:
    c < a:  g_i <- g_i + |g_i| (a sqrt(1 - c^2) - c sqrt(1 - a^2)) / (|g_j| sqrt(1 - a^2)) g_j;  now their cosine is a
    a_ij <- (1 - beta) a + beta c
and the sum over i. With all averages 0 this is PCGrad.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtml.balance.remembering import Remembering
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["GradVac"]

CLOSE = 1 - 1e-6  # the largest cosine to aim at: a cosine of 1 takes a step without end


class GradVac(Remembering):
    """Gradient Vaccine, for `mtml.balance.backward`; `cosines` [H, H] are the averages, 0 at the start.

    Args:
        losses: H.
        beta: how fast averages move, in [0, 1].
        generator: draws the orders; None for PyTorch's own.

    Raises:
        ValueError: beta outside [0, 1]; when used, another number of losses.

    Example:
        >>> import torch, mtml
        >>> x, method = torch.tensor([3.0, 1.0], requires_grad=True), mtml.balance.GradVac(2)
        >>> for _ in range(2):
        ...     weights, _ = mtml.balance.backward([x[0], x.sum()], method=method, shared=x)
        >>> weights, method.cosines[0, 1]
        (tensor([1., 1.], dtype=torch.float64), tensor(0.0141, dtype=torch.float64))

    Paper: Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models", 2020 (arXiv:2010.05874).
    """

    cosines: Tensor

    def __init__(self, losses: int, beta: float = 0.01, *, generator: torch.Generator | None = None) -> None:
        super().__init__(losses)
        self.beta, self.generator = check_number("beta", beta, least=0, most=1), generator
        self.register_buffer("cosines", torch.zeros(losses, losses, dtype=torch.float64))

    @torch.no_grad()
    def weigh(self, gram: Array) -> Array:
        self.check(gram)
        averages = self.cosines.double().cpu().numpy().copy()
        rows = np.diag((np.diagonal(gram) > 0).astype(gram.dtype))  # row i: the i-th gradient over the original ones
        for i in np.flatnonzero(np.diagonal(gram)):
            for j in torch.randperm(len(gram), generator=self.generator).tolist():
                if j != i and gram[j, j] > 0:
                    self._turn(gram, rows[i], averages[i], j)
        self.cosines.copy_(torch.from_numpy(averages))
        weights: Array = rows.sum(0)
        return weights

    def reset(self) -> None:
        """Forget the averages."""
        self.cosines.zero_()

    def _turn(self, gram: Array, row: Array, averages: Array, j: int) -> None:
        """Turn the gradient `row` towards the j-th where their cosine is below the average, in place."""
        length, other = math.sqrt(max(float(row @ gram @ row), 0.0)), math.sqrt(gram[j, j])
        cosine = min(max(float(row @ gram[:, j]) / (length * other), -1.0), 1.0) if length else 0.0
        aim = min(float(averages[j]), CLOSE)
        averages[j] += self.beta * (cosine - averages[j])
        if cosine < aim:
            sine, aimed = math.sqrt(1 - cosine**2), math.sqrt(1 - aim**2)
            row[j] += length * (aim * sine - cosine * aimed) / (other * aimed)
