"""higher's loop over tasks, for `bench.compat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def step(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The meta-step of a script, forward: -> the mean query loss."""
    opt = torch.optim.SGD(model.parameters(), lr=lr)

    def forward() -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            with package.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(steps):
                    diffopt.step(F.mse_loss(fmodel(sx), sy))
                losses.append(F.mse_loss(fmodel(qx), qy))
        return torch.stack(losses).mean()

    return forward


def engine(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The same by the one line for the batched engine."""
    opt = torch.optim.SGD(model.parameters(), lr=lr)

    def forward() -> Tensor:
        losses: Tensor = package.meta_loss(model, opt, *tasks, steps=steps, loss="mse")
        return losses.mean()

    return forward
