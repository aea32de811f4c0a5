"""Mixed-mode differentiation as in MixFlow-MG (Kemaev et al. 2025, arXiv 2505.00793): the peer in memory.

A step is theta' = theta - lr g(theta, x), g the support loss's gradient. The sweep back through the steps carries
c = dL/dtheta', which becomes c - lr (dg/dtheta)^T c, and gives x its share -lr (dg/dx)^T c. Second derivatives
commute, so both products are one jvp of the loss's gradient (to theta and to x) along c: reverse mode once, forward
mode over it. No graph joins two steps: what is kept of a step is its parameters, in one block of memory for all steps.

The tasks run under vmap, or in turn with the option ``loop``, which keeps one task's parameters at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

from bench.providers.base import Prepared, Result, loss_of
from bench.workloads import Data, Workload

REQUIRES = ("torch",)
OPTIONS = ("loop",)
Params = dict[str, Tensor]


def mse(output: Tensor, target: Tensor) -> Tensor:
    """F.mse_loss spelled out: forward mode over its backward raises (ZeroTensors are immutable; torch 2.13)."""
    return (output - target).square().mean()


class MetaStep:
    """The meta-step of a workload: ``lead`` is (tasks,) of all tasks together, () of one."""

    def __init__(self, w: Workload, net: nn.Module, lead: tuple[int, ...]) -> None:
        self.w, self.net, self.lead = w, net, lead
        self.loss_fn = mse if w.loss == "mse" else loss_of(w)
        self.wanted = (0, 1) if w.inputs else (0,)  # of loss(params, x, y)

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(functional_call(self.net, params, (x,)), y)

    def step(self, params: Params, x: Tensor, y: Tensor) -> Params:
        """A task's parameters after a step."""
        grads = grad(self.loss)(params, x, y)
        return {name: p - self.w.lr * grads[name] for name, p in params.items()}

    def step_back(self, params: Params, carry: Params, x: Tensor, y: Tensor) -> tuple[Params, list[Tensor]]:
        """The gradient to a step's parameters from that to its results, and its share of the gradient to x."""
        along, *inputs = jvp(lambda p: grad(self.loss, self.wanted)(p, x, y), (params,), (carry,))[1]
        return {name: c - self.w.lr * along[name] for name, c in carry.items()}, [-self.w.lr * t for t in inputs]

    def __call__(self, params: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Params, Tensor, Any]:
        """Gradients to the start (each task's own), query losses, and gradients to sx and qx where they are wanted."""
        states = self._adapt(params, sx, sy)
        query = self._over(grad_and_value(self.loss, self.wanted), states, 0, 0)
        (carry, *of_qx), losses = query(states.pop(), qx, qy)
        of_sx = [torch.zeros_like(sx) for _ in of_qx]
        while states:
            back = self._over(self.step_back, states, 0, 0, 0)
            row = {name: p.clone() for name, p in states.pop().items()}  # a tangent takes as much memory as its block
            carry, shares = back(row, carry, sx, sy)
            of_sx = [a + b for a, b in zip(of_sx, shares, strict=True)]
        return carry, losses, [*of_sx, *of_qx]

    def _adapt(self, params: Params, sx: Tensor, sy: Tensor) -> list[Params]:
        """The parameters before the first step, which all tasks share, and after each.

        Those after steps lie in one block: scattered between the steps' freed activations, the 8.3 MB of 30 more steps
        of siren raised the high-water mark by 18 to 82 MB, in a block by 19.
        """
        rows = {name: p.new_empty(self.w.steps, *self.lead, *p.shape) for name, p in params.items()}
        states = [params]
        for k in range(self.w.steps):
            after = self._over(self.step, states, 0, 0)(states[-1], sx, sy)
            states.append({name: rows[name][k].copy_(p) for name, p in after.items()})
        return states

    def _over(self, fn: Callable[..., Any], states: list[Params], *axes: int) -> Callable[..., Any]:
        """A function of the last of these states and of what is a task's own, over what runs together."""
        return vmap(fn, (None if len(states) == 1 else 0, *axes)) if self.lead else fn


def _batched(w: Workload, net: nn.Module, params: Params, batch: list[Tensor]) -> Callable[[], Result]:
    meta = MetaStep(w, net, (w.tasks,))

    def run() -> Result:
        grads, losses, inputs = meta(params, *batch)
        return losses.mean(), [*(g.mean(0) for g in grads.values()), *(g / w.tasks for g in inputs)]

    return run


def _looped(w: Workload, net: nn.Module, params: Params, batch: list[Tensor]) -> Callable[[], Result]:
    meta = MetaStep(w, net, ())
    tasks = list(zip(*(part.unbind(0) for part in batch), strict=True))

    def run() -> Result:
        sums, losses, inputs = [torch.zeros_like(p) for p in params.values()], [], []
        for task in tasks:
            grads, loss, of_inputs = meta(params, *task)
            torch._foreach_add_(sums, list(grads.values()), alpha=1 / w.tasks)
            losses.append(loss)
            inputs.append(of_inputs)
        return torch.stack(losses).mean(), [*sums, *(torch.stack(g) / w.tasks for g in zip(*inputs, strict=True))]

    return run


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    params = {name: value.detach() for name, value in net.named_parameters()}
    build = _looped if "loop" in options else _batched
    return Prepared(build(w, net, params, [part.detach() for part in data]))
