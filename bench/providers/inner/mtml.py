"""This project: ``mtml.MAML(...)`` and its ``meta_loss`` or ``adapt_tasks``; ``mtml.ANIL`` where the head alone adapts.

An option is a backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import Prepared, Result
from bench.providers.inner import base
from bench.workloads.inner import InnerWorkload, Problem, Tensors

REQUIRES = ("mtml",)
OPTIONS = ("cpu", "reference", "general", "weights", "low_rank")


def learner(w: InnerWorkload, p: Problem, options: frozenset[str], lr: Tensor | float | Tensors) -> Any:
    """The learner of a workload."""
    import mtml

    option = next(iter(options), "auto")
    if w.head:
        assert isinstance(p.net, nn.Sequential)
        head = p.net[-1]
        assert isinstance(head, nn.Linear)
        return mtml.ANIL(p.net[:-1], head, lr, steps=w.steps, loss=w.loss, batch_norm="task", backend=option)
    return mtml.MAML(
        p.net,
        lr=lr,
        steps=w.steps,
        loss=w.loss,
        params=w.adapted or None,
        update=mtml.inner.Adam(eps_root=w.eps_root) if w.update == "adam" else None,
        backend=f"cpu:{option}" if option in ("weights", "low_rank") else option,
    )


def prepare(w: InnerWorkload, p: Problem, options: frozenset[str]) -> Prepared:
    sx, rate = (t.clone().requires_grad_(w.goal == "expert") for t in (p.sx, p.lr))
    rates = {n.removeprefix("lr."): t.clone().requires_grad_() for n, t in p.rates.items()}
    maml = learner(w, p, options, rates or (rate if w.goal == "expert" else w.lr))
    trained = [*(t for n, t in p.net.named_parameters() if n in p.trained), *rates.values()]
    by_name: dict[str, Any] = {"per_step": w.per_step, "start": p.start if w.own_starts else None}

    def query() -> Result:
        loss: Tensor = maml.meta_loss(p.sx, p.sy, p.qx, p.qy).mean()
        return loss.detach(), list(torch.autograd.grad(loss, trained))

    @torch.no_grad()
    def adapt() -> tuple[Tensor, Tensors]:
        adapted = maml.adapt_tasks(p.sx, p.sy, **by_name)
        return adapted.support_losses[-1].mean(), adapted.params

    def expert() -> Result:
        adapted = maml.adapt_tasks(sx, p.sy)
        total = base.distance({n: t[0] for n, t in adapted.params.items()}, p.start, p.expert)
        return total.detach(), list(torch.autograd.grad(total, [sx, rate]))

    if w.goal == "adapt":
        return Prepared(adapt, lambda value: base.moved(p, value))
    return Prepared(expert if w.goal == "expert" else query)
