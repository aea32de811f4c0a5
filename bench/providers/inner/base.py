"""What the inner-loop providers of PyTorch share: the step of a rule, the loss of a network, the form of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.providers.base import Result, loss_of
from bench.workloads.inner import InnerWorkload, Problem, Tensors

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Moments = tuple[Tensors, Tensors] | tuple[()]
"""Adam's two means, by name; gradient descent has none."""


def moments(w: InnerWorkload, start: Mapping[str, Any]) -> Any:
    """The moments before the first step, of arrays of any library."""
    return ({n: 0 * t for n, t in start.items()}, {n: 0 * t for n, t in start.items()}) if w.update == "adam" else ()


def corrections(step: Any) -> tuple[Any, Any]:
    """What Adam divides its means by at step 0, 1, ..."""
    return 1 - BETA1 ** (step + 1), 1 - BETA2 ** (step + 1)


def updated(
    w: InnerWorkload, theta: Mapping[str, Any], grads: Mapping[str, Any], held: Any, lr: Any, scales: tuple[Any, Any]
) -> tuple[Any, Any]:
    """The parameters and moments after a step of the workload's rule; arrays of any library. ``lr`` may be by name."""
    if w.update == "sgd":
        return {n: theta[n] - (lr[n] if isinstance(lr, Mapping) else lr) * grads[n] for n in theta}, ()
    m = {n: BETA1 * held[0][n] + (1 - BETA1) * grads[n] for n in theta}
    v = {n: BETA2 * held[1][n] + (1 - BETA2) * grads[n] * grads[n] for n in theta}
    spread = {n: (v[n] / scales[1] + w.eps_root) ** 0.5 + EPS for n in theta}
    return {n: theta[n] - lr * (m[n] / scales[0]) / spread[n] for n in theta}, (m, v)


def objective(w: InnerWorkload, p: Problem) -> Callable[[Tensors, Tensors, Tensor, Tensor], Tensor]:
    """loss(adapted, fixed, x, y) of one task; x as ``read`` gives it."""
    loss_fn = loss_of(w)
    if w.head:
        return lambda theta, fixed, x, y: loss_fn(F.linear(x, *theta.values()), y)
    return lambda theta, fixed, x, y: loss_fn(functional_call(p.net, {**fixed, **theta}, (x,)), y)


def read(w: InnerWorkload, p: Problem, fixed: Tensors, sx: Tensor, qx: Tensor) -> tuple[Tensor, Tensor]:
    """What the inner loop of a task reads: its sets, or for a head their features, by one pass over both."""
    if not w.head:
        return sx, qx
    rows = functional_call(trunk_of(p), fixed, (torch.cat((sx, qx)),))
    return rows[: len(sx)], rows[len(sx) :]


def trunk_of(p: Problem) -> nn.Module:
    """All layers but the last."""
    assert isinstance(p.net, nn.Sequential)
    return p.net[:-1]


def rate_of(lr: Any, rates: Mapping[str, Any], step: int) -> Any:
    """The rate of a step, or those of all elements by the names of their tensors."""
    return {n.removeprefix("lr."): rows[step] for n, rows in rates.items()} if rates else lr


def of_task(tensors: Tensors, task: int, own: bool) -> Tensors:
    """A task's tensors: its row where every task has its own."""
    return {n: t[task] for n, t in tensors.items()} if own else tensors


def of_step(w: InnerWorkload, data: Tensor, step: int, axis: int = 0) -> Tensor:
    """The data of a step: a slice along ``axis`` where every step has its own."""
    return data.select(axis, step) if w.per_step else data


def distance(theta: Tensors, start: Tensors, expert: Tensors) -> Tensor:
    """|theta - expert|^2 / |start - expert|^2 over all tensors."""

    def squared(tensors: Tensors) -> Tensor:
        return torch.stack([(t - expert[n]).square().sum() for n, t in tensors.items()]).sum()

    return squared(theta) / squared(start)


def moved(p: Problem, value: tuple[Tensor, Tensors]) -> Result:
    """A result of the goal ``adapt``: the mean support loss before the last step, and theta_K - theta_0."""
    loss, theta = value
    return loss, [theta[n] - t for n, t in p.start.items()]


def channels_last(p: Problem) -> Problem:
    """The same problem with channels innermost in memory: oneDNN's fast layout on the CPU."""

    def inner(t: Tensor) -> Tensor:
        if t.dim() < 4:
            return t
        return t.flatten(0, -4).contiguous(memory_format=torch.channels_last).view_as(t)

    start, fixed = ({n: inner(t) for n, t in tensors.items()} for tensors in (p.start, p.fixed))
    return p._replace(sx=inner(p.sx), qx=inner(p.qx), start=start, fixed=fixed)
