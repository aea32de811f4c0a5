"""``python -m bench multitask``: a meta-step of `mtml.MultiTaskMAML`, a loop over tasks and torch.func, in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml
from bench.measure import timing
from bench.measure.gate import relative, within
from bench.workloads.multitask import LR, STEPS, make_batches, make_model

__all__ = ["WAYS", "MultiTask", "measure"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}  # of gradients, relative to the largest number in them
WAYS = ("mtml", "loop", "torch.func")
Params = tuple[Tensor, Tensor]
Losses = Callable[[mtml.MultiTaskMAML, Mapping[str, mtml.TaskBatch]], Tensor]
# of rows of predictions [R, C]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class": F.cross_entropy,
    "value": F.mse_loss,
    "label": F.binary_cross_entropy_with_logits,
    "token": F.cross_entropy,
}


@dataclass(frozen=True)
class MultiTask:
    """Timings by way, and by dtype and way the largest relative difference of gradients from the loop's."""

    tasks: int
    timings: dict[str, timing.Timing]
    errors: dict[torch.dtype, dict[str, float]]

    @property
    def ok(self) -> bool:
        """Whether all ways have the same gradients."""
        return all(within(error, TOLERANCES[dtype]) for dtype, each in self.errors.items() for error in each.values())

    def lines(self) -> list[str]:
        """The report."""
        head = f"multitask: 4 kinds x {self.tasks} tasks, {STEPS} steps, forward and backward"
        found = [f"{head}, {torch.get_num_threads()} threads, medians, in turn"]
        ours = self.timings["mtml"].ms if "mtml" in self.timings else 0.0
        for way, took in self.timings.items():
            different = ", ".join(f"{each[way]:.1e} ({str(d)[6:]})" for d, each in self.errors.items() if way in each)
            match = f"relative difference {different}" if different else "the loop itself"
            found.append(f"{way:<10} {took.ms:9.3f} ms, {took.ms / ours:6.2f}x of mtml, gradients: {match}")
        return found if self.ok else [*found, "MISMATCH: nothing was timed"]


def _trunk(model: mtml.MultiTaskMAML, name: str) -> nn.Module:
    assert isinstance(model.trunk, nn.ModuleDict)
    return model.trunk[name]


def _rows(x: Tensor) -> Tensor:
    """[N, D] or [N, L, D] as rows."""
    return x.flatten(0, -2)


def _targets(y: Tensor) -> Tensor:
    """Of one task: ids [N] or [N, L] as rows, values [N, C] as they are."""
    return y if y.is_floating_point() else y.flatten()


def _ours(model: mtml.MultiTaskMAML, batches: Mapping[str, mtml.TaskBatch]) -> Tensor:
    return model.meta_loss(batches).total


def _loop(model: mtml.MultiTaskMAML, batches: Mapping[str, mtml.TaskBatch]) -> Tensor:
    """Task by task, the trunk once a task and set: autograd through the steps of the head."""
    total: list[Tensor] = []
    for name, batch in batches.items():
        trunk, loss, layer = _trunk(model, name), LOSSES[name], model.heads[name]
        losses = []
        for t in range(batch.tasks):
            support, query = _rows(trunk(batch.sx[t])), _rows(trunk(batch.qx[t]))
            fast: Params = (layer.weight, layer.bias)
            for _ in range(STEPS):
                inner = loss(F.linear(support, *fast), _targets(batch.sy[t]))
                grads = torch.autograd.grad(inner, fast, create_graph=True)
                fast = (fast[0] - LR * grads[0], fast[1] - LR * grads[1])
            losses.append(loss(F.linear(query, *fast), _targets(batch.qy[t])))
        total.append(torch.stack(losses).mean())
    return torch.stack(total).sum()


def _func(model: mtml.MultiTaskMAML, batches: Mapping[str, mtml.TaskBatch]) -> Tensor:
    """vmap over a group's tasks of torch.func.grad, the trunk once for all samples of the group."""
    total = []
    for name, batch in batches.items():
        trunk, layer, task = _trunk(model, name), model.heads[name], _task(LOSSES[name])
        cut = batch.sx.shape[0] * batch.sx.shape[1]
        features = trunk(torch.cat([batch.sx.flatten(0, 1), batch.qx.flatten(0, 1)]))
        support = features[:cut].unflatten(0, batch.sx.shape[:2])
        query = features[cut:].unflatten(0, batch.qx.shape[:2])
        each = torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))
        total.append(each((layer.weight, layer.bias), support, batch.sy, query, batch.qy).mean())
    return torch.stack(total).sum()


def _task(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def of(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(F.linear(_rows(x), *params), _targets(y))

    def task(params: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        for _ in range(STEPS):
            grads = torch.func.grad(of)(params, sx, sy)
            params = (params[0] - LR * grads[0], params[1] - LR * grads[1])
        return of(params, qx, qy)

    return task


RUNS: dict[str, Losses] = {"mtml": _ours, "loop": _loop, "torch.func": _func}


def _gradients(way: str, model: mtml.MultiTaskMAML, batches: Mapping[str, mtml.TaskBatch]) -> list[Tensor]:
    return list(torch.autograd.grad(RUNS[way](model, batches), list(model.parameters())))


def _errors(tasks: int, dtype: torch.dtype) -> dict[str, float]:
    """Of every way but the loop."""
    model, batches = make_model(dtype), make_batches(tasks, dtype)
    expected = _gradients("loop", model, batches)
    return {way: relative(_gradients(way, model, batches), expected) for way in WAYS if way != "loop"}


def measure(tasks: int, threads: int, seconds: float) -> MultiTask:
    """Times of a meta-step by each way, about `seconds` for each, where all ways have the same gradients."""
    torch.set_num_threads(threads)
    errors = {dtype: _errors(tasks, dtype) for dtype in TOLERANCES}
    gate = MultiTask(tasks, {}, errors)
    if not gate.ok:
        return gate
    model, batches = make_model(torch.float32), make_batches(tasks, torch.float32)
    runs = {way: functools.partial(_gradients, way, model, batches) for way in WAYS}
    return MultiTask(tasks, timing.interleave(runs, seconds), errors)
