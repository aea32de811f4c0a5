"""higher: a differentiable SGD over a patched module, one task after another."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import Prepared, loss_of, stored_grads
from bench.workloads import Data, Workload

REQUIRES = ("higher",)
OPTIONS: tuple[str, ...] = ()


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    higher: Any = importlib.import_module("higher")

    sx, sy, qx, qy = data
    loss_fn, optimizer = loss_of(w), torch.optim.SGD(net.parameters(), lr=w.lr)

    def backward() -> Tensor:
        total = torch.zeros((), device=sx.device, dtype=sx.dtype)
        for t in range(w.tasks):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(w.steps):
                    inner.step(loss_fn(fast(sx[t]), sy[t]))
                loss = loss_fn(fast(qx[t]), qy[t]) / w.tasks
                loss.backward()
                total += loss.detach()
        return total

    return stored_grads(w, net, data, backward)
