"""``python -m bench task-map``: one function of a task by each way of `mtml.task_map`, beside `mtml.MAML`, in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from bench.measure import timing
from bench.measure.gate import relative, within
from bench.workloads import Workload, make_data, make_network, select

__all__ = ["Ways", "measure"]

TOLERANCE = 1e-3  # of gradients in float32, relative to the largest number in them
WAYS = ("fused", "vmap", "loop")
LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


@dataclass(frozen=True)
class Ways:
    """Timings by way, and the largest relative difference of gradients from the loop's."""

    workload: Workload
    timings: dict[str, timing.Timing]
    errors: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether all ways have the same gradients."""
        return all(within(error, TOLERANCE) for error in self.errors.values())

    def lines(self) -> list[str]:
        """The report."""
        loop = self.timings["loop"].ms
        found = [f"{self.workload.name}: forward and backward, {torch.get_num_threads()} threads, medians, in turn"]
        for way, took in self.timings.items():
            match = f"relative difference {self.errors[way]:.1e}" if way in self.errors else "the loop itself"
            found.append(f"{way:<6} {took.ms:10.3f} ms, {loop / took.ms:8.2f}x, gradients: {match}")
        return found


def _task(model: nn.Module, w: Workload) -> Callable[..., Tensor]:
    loss = LOSSES[w.loss]

    def of(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        params: Any = dict(model.named_parameters())
        for _ in range(w.steps):
            grads = torch.func.grad(of)(params, sx, sy)
            params = {name: p - w.lr * grads[name] for name, p in params.items()}
        return of(params, qx, qy)

    return task


def measure(workload: str, threads: int, seconds: float) -> Ways:
    """Times of a workload's meta-step by each way; about `seconds` for each.

    Raises:
        ValueError: an unknown workload.
    """
    w = select([workload])[0]
    torch.set_num_threads(threads)
    model, data = make_network(w), make_data(w)
    leaves = [p for p in model.parameters() if p.requires_grad]
    task = _task(model, w)
    meta: dict[str, Callable[..., Tensor]] = {way: mtml.task_map(task, way=way) for way in WAYS}
    meta["MAML"] = mtml.MAML(model, w.lr, steps=w.steps, loss=w.loss).meta_loss

    def run(way: str) -> list[Tensor]:
        return list(torch.autograd.grad(meta[way](*data).mean(), leaves))

    gradients = {way: run(way) for way in meta}
    errors = {way: relative(found, gradients["loop"]) for way, found in gradients.items() if way != "loop"}
    return Ways(w, timing.interleave({way: functools.partial(run, way) for way in meta}, seconds), errors)
