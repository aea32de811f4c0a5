"""torch.func: vmap of grad over the tasks. The option ``loop`` runs the tasks in turn (faster where vmap is slow)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from bench.providers.base import Prepared, Result, loss_of
from bench.workloads import Data, Workload

REQUIRES = ("torch",)
OPTIONS = ("loop",)
Params = dict[str, Tensor]


def task_loss(w: Workload, net: nn.Module) -> Callable[..., Tensor]:
    """task(params, sx, sy, qx, qy) -> the query loss of one task after the inner loop."""
    loss_fn = loss_of(w)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(net, params, (x,)), y)

    def task(params: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        for _ in range(w.steps):
            grads = grad(loss)(params, sx, sy)
            params = {name: params[name] - w.lr * grads[name] for name in params}
        return loss(params, qx, qy)

    return task


def _batched(w: Workload, net: nn.Module, data: Data, wrap: Callable[..., Any]) -> Prepared:
    task = task_loss(w, net)

    def meta(params: Params, *batch: Tensor) -> Tensor:
        return vmap(task, (None, 0, 0, 0, 0))(params, *batch).mean()

    fn = wrap(grad_and_value(meta, argnums=(0, 1, 3) if w.inputs else (0,)))
    params = {name: value.detach() for name, value in net.named_parameters()}
    batch = [part.detach() for part in data]

    def run() -> Result:
        grads, value = fn(params, *batch)
        return value, [*grads[0].values(), *grads[1:]]

    return Prepared(run)


def _looped(w: Workload, net: nn.Module, data: Data, wrap: Callable[..., Any]) -> Prepared:
    fn = wrap(grad_and_value(task_loss(w, net), argnums=(0, 1, 3) if w.inputs else (0,)))
    params = {name: value.detach() for name, value in net.named_parameters()}
    batches = list(zip(*(part.detach().unbind(0) for part in data), strict=True))

    def run() -> Result:
        results = [fn(params, *batch) for batch in batches]
        sums = [value / w.tasks for value in results[0][0][0].values()]
        for (grads, *_), _value in results[1:]:
            torch._foreach_add_(sums, list(grads.values()), alpha=1 / w.tasks)
        inputs = [torch.stack([grads[i] for grads, _ in results]) / w.tasks for i in range(1, len(results[0][0]))]
        return torch.stack([value for _, value in results]).mean(), [*sums, *inputs]

    return Prepared(run)


def build(w: Workload, net: nn.Module, data: Data, options: frozenset[str], wrap: Callable[..., Any]) -> Prepared:
    """The functional meta-step with ``wrap`` (identity, or torch.compile) around what is called."""
    return (_looped if "loop" in options else _batched)(w, net, data, wrap)


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    return build(w, net, data, options, lambda fn: fn)
