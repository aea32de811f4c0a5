"""Plain autograd, one task after another.

``per_task`` differentiates each task's loss on its own, so that one task's graph is alive at a time. ``checkpoint``
(one task, goal ``expert``) keeps the parameters of every step alone and repeats the steps in reverse, one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.providers.base import Prepared, Result
from bench.providers.inner import base
from bench.workloads.inner import InnerWorkload, Problem, Tensors

REQUIRES = ("torch",)
OPTIONS = ("per_task", "checkpoint", "channels_last")
Rate = Tensor | Tensors


class Loop:
    """The inner loop of one workload."""

    def __init__(self, w: InnerWorkload, p: Problem) -> None:
        self.w, self.p, self.loss = w, p, base.objective(w, p)

    def step(
        self, theta: Tensors, fixed: Tensors, x: Tensor, y: Tensor, held: object, lr: Rate, k: int, graph: bool
    ) -> tuple[Tensor, Tensors, object]:
        """(loss before the step, parameters and moments after it); differentiable with ``graph``."""
        loss = self.loss(theta, fixed, x, y)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=graph)
        named = dict(zip(theta, grads, strict=True))
        with torch.set_grad_enabled(graph):
            return loss, *base.updated(self.w, theta, named, held, lr, base.corrections(k))

    def adapt(
        self, task: int, start: Tensors, fixed: Tensors, sx: Tensor, lr: Tensor, graph: bool, rates: Tensors
    ) -> Tensors:
        """A task's parameters after all steps on its own sx; the graph reaches back to all that is given."""
        theta = base.of_task(start, task, self.w.own_starts)
        if not any(t.requires_grad for t in theta.values()):
            theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
        held = base.moments(self.w, theta)
        for k in range(self.w.steps):
            x, y = base.of_step(self.w, sx, k), base.of_step(self.w, self.p.sy[task], k)
            rate = base.rate_of(lr, rates, k)
            self.last, theta, held = self.step(theta, fixed, x, y, held, rate, k, graph)
            if not graph:
                theta = {n: t.requires_grad_() for n, t in theta.items()}
        return theta

    def query(self) -> Result:
        return self._mean(range(self.w.tasks))

    def _mean(self, tasks: range) -> Result:
        """The sum of some tasks' query losses over the number of all tasks, and its gradient."""
        p, trained = self.p, {n: t.detach().requires_grad_() for n, t in self.p.trained.items()}
        start, fixed = ({n: trained.get(n, t) for n, t in part.items()} for part in (p.start, p.fixed))
        rates = {n: trained[n] for n in p.rates}
        total = torch.zeros((), dtype=p.sx.dtype, device=p.sx.device)
        for t in tasks:
            sx, qx = base.read(self.w, p, fixed, p.sx[t], p.qx[t])
            theta = self.adapt(t, start, fixed, sx, p.lr, True, rates)
            total = total + self.loss(theta, fixed, qx, p.qy[t]) / self.w.tasks
        return total.detach(), list(torch.autograd.grad(total, list(trained.values())))

    def query_per_task(self) -> Result:
        total, sums = self._mean(range(1))
        for t in range(1, self.w.tasks):
            loss, grads = self._mean(range(t, t + 1))
            total += loss
            torch._foreach_add_(sums, grads)
        return total, sums

    def weights(self) -> tuple[Tensor, Tensors]:
        losses, rows = [], []
        for t in range(self.w.tasks):
            rows.append(self.adapt(t, self.p.start, self.p.fixed, self.p.sx[t], self.p.lr, False, {}))
            losses.append(self.last.detach())
        stacked = {n: torch.stack([row[n].detach() for row in rows]) for n in self.p.start}
        return torch.stack(losses).mean(), stacked

    def expert(self) -> Result:
        p, sx, lr = self.p, self.p.sx.detach().requires_grad_(), self.p.lr.detach().requires_grad_()
        total = base.distance(self.adapt(0, p.start, p.fixed, sx[0], lr, True, {}), p.start, p.expert)
        return total.detach(), list(torch.autograd.grad(total, [sx, lr]))

    def expert_in_reverse(self) -> Result:
        p, theta, states = self.p, self.p.start, []
        for k in range(self.w.steps):
            states.append(theta)
            leaves = {n: t.detach().requires_grad_() for n, t in theta.items()}
            _, theta, _ = self.step(leaves, p.fixed, p.sx[0], p.sy[0], (), p.lr, k, graph=False)
        last = {n: t.detach().requires_grad_() for n, t in theta.items()}
        total = base.distance(last, p.start, p.expert)
        grads, sums = list(torch.autograd.grad(total, list(last.values()))), [torch.zeros_like(p.sx), 0 * p.lr]
        for k in reversed(range(self.w.steps)):
            leaves = {n: t.detach().requires_grad_() for n, t in states.pop().items()}
            given = [p.sx.detach().requires_grad_(), p.lr.detach().requires_grad_()]
            _, after, _ = self.step(leaves, p.fixed, given[0][0], p.sy[0], (), given[1], k, graph=True)
            pulled = torch.autograd.grad(list(after.values()), [*leaves.values(), *given], grads)
            grads = list(pulled[: len(leaves)])
            torch._foreach_add_(sums, list(pulled[len(leaves) :]))
        return total.detach(), sums


def prepare(w: InnerWorkload, p: Problem, options: frozenset[str]) -> Prepared:
    p = base.channels_last(p) if "channels_last" in options else p
    loop = Loop(w, p)
    if w.goal == "adapt":
        return Prepared(loop.weights, lambda value: base.moved(p, value))
    if w.goal == "expert":
        return Prepared(loop.expert_in_reverse if "checkpoint" in options else loop.expert)
    return Prepared(loop.query_per_task if "per_task" in options else loop.query)
