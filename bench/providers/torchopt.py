"""TorchOpt's MetaSGD, the state of network and optimiser extracted and recovered around each task."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from bench.providers.base import Prepared, Result, loss_of
from bench.workloads import Data, Workload, wanted

REQUIRES = ("torchopt",)
OPTIONS: tuple[str, ...] = ()


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    torchopt: Any = importlib.import_module("torchopt")

    sx, sy, qx, qy = data
    loss_fn, inner = loss_of(w), torchopt.MetaSGD(net, lr=w.lr)
    leaves = wanted(w, net.parameters(), data)  # before the first step: TorchOpt replaces the parameters by graph nodes

    def total_loss() -> Tensor:
        total = sx.new_zeros(())
        start = torchopt.extract_state_dict(net, by="reference", detach_buffers=True)
        optimizer_start = torchopt.extract_state_dict(inner, by="reference")
        for t in range(w.tasks):
            for _ in range(w.steps):
                inner.step(loss_fn(net(sx[t]), sy[t]))
            total = total + loss_fn(net(qx[t]), qy[t]) / w.tasks
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, optimizer_start)
        return total

    def run() -> Result:
        for leaf in leaves:
            leaf.grad = None
        total = total_loss()
        total.backward()
        return total.detach(), [leaf.grad for leaf in leaves]  # type: ignore[misc]

    return Prepared(run)
