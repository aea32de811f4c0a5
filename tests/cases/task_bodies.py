"""Inner loops as people write them for one task, and what to hold `task_map` of them against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

import mtml

__all__ = ["batch", "by_autograd", "by_func", "gradients", "network", "way_of"]

Loss = Callable[[Tensor, Tensor], Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(tasks: int = 4, classes: int = 0) -> list[Tensor]:
    """sx, sy, qx, qy."""
    inputs = [torch.randn(tasks, n, 2, dtype=torch.float64) for n in (5, 6)]
    if classes:
        targets = [torch.randint(classes, (tasks, n)) for n in (5, 6)]
    else:
        targets = [torch.randn(tasks, n, 3, dtype=torch.float64) for n in (5, 6)]
    return [inputs[0], targets[0], inputs[1], targets[1]]


def by_autograd(
    model: nn.Module, lr: Any = 0.1, steps: int = 2, loss: Loss = F.mse_loss, second_order: bool = True
) -> Callable[..., Tensor]:
    """One task by torch.autograd.grad."""

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params = dict(model.named_parameters())
        for _ in range(steps):
            inner = loss(functional_call(model, params, sx), sy)
            grads = torch.autograd.grad(inner, list(params.values()), create_graph=second_order)
            params = {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
        return loss(functional_call(model, params, qx), qy)

    return task


def by_func(model: nn.Module, lr: Any = 0.1, steps: int = 2, loss: Loss = F.mse_loss) -> Callable[..., Tensor]:
    """One task by torch.func.grad."""

    def of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params = dict(model.named_parameters())
        for _ in range(steps):
            grads = grad(of)(params, sx, sy)
            params = {n: p - lr * grads[n] for n, p in params.items()}
        return of(params, qx, qy)

    return task


def gradients(results: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a combination in which the tasks differ."""
    weights = torch.arange(1, len(results) + 1, dtype=results.dtype)
    return list(
        torch.autograd.grad(
            (results.flatten(1).sum(1) if results.ndim > 1 else results) @ weights,
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def way_of(mapped: mtml.TaskMap, *args: Any) -> str:
    return mapped.explain(*args).way
