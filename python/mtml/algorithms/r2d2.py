"""R2D2: a ridge regression on learned features as the inner problem, solved in closed form."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from mtml.algorithms.anil import AdaptedHead
from mtml.algorithms.base import Loss, MetaLearner
from mtml.paths.path import Outcome, Path
from mtml.paths.ridge import RidgeFinder
from mtml.wrappers import refuse_data_parallel
from mtml_kernels.checks import check_number, check_steps, shown
from mtml_kernels.general import GeneralPlan
from mtml_kernels.losses import LossSpec, resolve
from mtml_kernels.precision import first_floating

__all__ = ["R2D2", "AdaptedRidge"]


class R2D2(MetaLearner):
    """Ridge Regression Differentiable Discriminator: the head is fitted exactly, and the fit is differentiated.

        W_t = argmin_W sum_s w_s |f(x_s) W - y_s|^2 + lambda |W|^2  =  X^T (D X X^T + lambda I)^-1 D Y,   D = diag(w)
        predictions = scale * f(x) W_t + shift

    y is the class as a one-hot vector, or a float target as it is; w the support mask. lambda, scale and shift are
    learned beside the trunk f. Exact gradients through the solution, to everything. The trunk sees the support and
    query samples of all tasks in one batch, as `ANIL`'s: batch normalisation in train mode takes its statistics there.

    Args:
        features: the trunk, x [N, ...] -> [N, D] (further dimensions are flattened).
        outputs: how many classes, or numbers to predict.
        strength: lambda at the start. It stays positive: its logarithm is the parameter, ``log_strength``.
        scale, shift: at the start.
        loss, query_loss: as of `MAML`, of the predictions [Q, outputs]; `loss` says what the targets are, and judges
            where `query_loss` is None.
        learnable: whether lambda, scale and shift require grad.

    Raises:
        ValueError, TypeError: options or targets that do not fit; the inner loop's other options (steps, first_order,
            start), which a closed form does not have.

    Example:
        >>> import torch, mtml
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU())
        >>> learner = mtml.R2D2(trunk, outputs=5)
        >>> x, y = torch.randn(4, 10, 8), torch.randint(5, (4, 10))
        >>> learner.meta_loss(x, y, x, y).mean().backward()
        >>> learner.adapt_tasks(x, y).params["head.weight"].shape
        torch.Size([4, 5, 32])

    Paper: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers", 2019
    (arXiv:1805.08136).
    """

    def __init__(
        self,
        features: nn.Module,
        outputs: int,
        *,
        strength: float = 1.0,
        scale: float = 1.0,
        shift: float = 0.0,
        loss: Loss = "cross_entropy",
        query_loss: Loss | None = None,
        learnable: bool = True,
    ) -> None:
        super().__init__(steps=1, loss=loss, query_loss=query_loss, backend="auto", backends=("auto",))
        if not isinstance(features, nn.Module):
            raise TypeError(f"features: expected an nn.Module, got {shown(features)}")
        refuse_data_parallel("features", features)
        if check_steps(outputs, "outputs") < 1:
            raise ValueError(f"outputs: expected at least 1, got {outputs}")
        if not isinstance(resolve(loss), LossSpec):
            raise ValueError(
                "loss: expected one known by name, which says what targets are; pass others as query_loss="
            )
        if query_loss is not None:
            resolve(query_loss)
        start = math.log(check_number("strength", strength, above=0))
        numbers = start, check_number("scale", scale), check_number("shift", shift)
        like = first_floating(features.parameters())
        self.features, self.outputs = features, outputs
        self.log_strength, self.scale, self.shift = (
            nn.Parameter(torch.tensor(v, dtype=like.dtype, device=like.device), learnable) for v in numbers
        )
        self._paths = RidgeFinder(self)

    @property
    def strength(self) -> Tensor:
        """lambda."""
        return self.log_strength.exp()

    def _adapted(self, path: Path, result: Outcome, keep_steps: bool, taken: int) -> AdaptedRidge:
        loss = self.loss if self.query_loss is None else self.query_loss
        return AdaptedRidge(self, result.adapted, result.support_losses, loss, False, GeneralPlan("vmap", "", "module"))


class AdaptedRidge(AdaptedHead):
    """What `R2D2.adapt_tasks` returns: heads [T, outputs, D] on one trunk; scale and shift are in them."""

    def task(self, t: int, step: int = -1) -> nn.Module:
        """Task t's trunk and head as a module of its own, copied and cut off from the graph.

        Raises IndexError for a task or step that there is not.
        """
        weight, bias = self.params_at(step)["head.weight"], self.params["head.bias"]
        if not -self.tasks <= t < self.tasks:
            raise IndexError(f"t: expected a task below {self.tasks}, got {t}")
        head = nn.Linear(weight.shape[2], weight.shape[1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            head.weight.copy_(weight[t])
            head.bias.copy_(bias[t])
        assert isinstance(self.model, R2D2)
        parts: dict[str, Any] = {"features": copy.deepcopy(self.model.features), "flat": nn.Flatten(), "head": head}
        return nn.Sequential(OrderedDict(parts))
