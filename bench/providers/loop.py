"""Plain PyTorch, one task after another: what learn2learn and others do underneath. The match gate's oracle.

The option ``per_task`` differentiates each task's loss on its own, so only one task's graph is alive at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.providers.base import Prepared, Result, loss_of
from bench.workloads import Data, Workload, wanted

REQUIRES = ("torch",)
OPTIONS = ("per_task",)


def query_loss(w: Workload, net: nn.Module, data: Data, task: int) -> Tensor:
    """Adapt to one task and return its query loss, differentiable to second order."""
    sx, sy, qx, qy = (part[task] for part in data)
    loss_fn = loss_of(w)
    fast: dict[str, Tensor] = dict(net.named_parameters())
    for _ in range(w.steps):
        loss = loss_fn(functional_call(net, fast, (sx,)), sy)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: value - w.lr * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
    return loss_fn(functional_call(net, fast, (qx,)), qy)


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    leaves = wanted(w, net.parameters(), data)

    def all_tasks() -> Result:
        losses = [query_loss(w, net, data, task) for task in range(w.tasks)]
        total = torch.stack(losses).mean()
        return total.detach(), list(torch.autograd.grad(total, leaves))

    def per_task() -> Result:
        total, sums = torch.zeros((), device=data[0].device, dtype=data[0].dtype), [torch.zeros_like(x) for x in leaves]
        for task in range(w.tasks):
            loss = query_loss(w, net, data, task) / w.tasks
            total += loss.detach()
            torch._foreach_add_(sums, torch.autograd.grad(loss, leaves))
        return total, sums

    return Prepared(per_task if "per_task" in options else all_tasks)
