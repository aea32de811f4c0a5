"""One training step two ways: through the fused engine, and the plain-PyTorch way it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.tasks.task_batch import TaskBatch

__all__ = ["engine_step", "inner_rates", "make_maml", "plain_losses", "plain_step"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def make_maml(
    model: nn.Module, *, lr: float, steps: int, loss: str, per: str | None = None, backend: str = "auto"
) -> mtml.MAML:
    """The learner; `per` ("all", "tensor", "element") makes its inner rates learnable (per element: Meta-SGD)."""
    rates = lr if per is None else mtml.InnerLR(model, lr, per=per)
    return mtml.MAML(model, lr=rates, steps=steps, loss=loss, backend=backend)


def engine_step(maml: mtml.MAML, optimizer: Any, stream: Iterator[TaskBatch]) -> Callable[[], Tensor]:
    """A function that trains on the next meta-batch and returns its losses [T]."""

    def step() -> Tensor:
        losses = maml.meta_loss(next(stream))  # [T]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        return losses.detach()

    return step


def inner_rates(maml: mtml.MAML) -> dict[str, Tensor | float]:
    """The learner's inner rate for every parameter by name."""
    rates: Any = maml.lr.as_dict() if isinstance(maml.lr, mtml.InnerLR) else maml.lr
    return {name: rates[name] if isinstance(rates, Mapping) else rates for name, _ in maml.module.named_parameters()}


def plain_losses(
    model: nn.Module, batch: TaskBatch, *, rates: Mapping[str, Tensor | float], steps: int, loss: str
) -> Tensor:
    """MAML with nothing but PyTorch, one task after another and differentiable to second order: query losses [T].

    `rates` is the inner learning rate of every parameter by name, the same at every step.
    """
    compute = LOSSES[loss]
    losses = []
    for sx, sy, qx, qy in zip(batch.sx, batch.sy, batch.qx, batch.qy, strict=True):
        fast: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(steps):
            inner = compute(functional_call(model, fast, (sx,)), sy)
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {name: p - rates[name] * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(compute(functional_call(model, fast, (qx,)), qy))
    return torch.stack(losses)


def plain_step(maml: mtml.MAML, optimizer: Any, stream: Iterator[TaskBatch], loss: str) -> Callable[[], Tensor]:
    """As `engine_step`, on the same learner, the plain way."""

    def step() -> Tensor:
        losses = plain_losses(maml.module, next(stream), rates=inner_rates(maml), steps=maml.steps, loss=loss)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        return losses.detach()

    return step
