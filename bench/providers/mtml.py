"""This project: ``mtml.MAML(...).meta_loss(batch).mean().backward()``. An option is a backend: ``mtml:general``."""

from __future__ import annotations

from torch import Tensor, nn

from bench.providers.base import Prepared, stored_grads
from bench.workloads import Data, Workload

REQUIRES = ("mtml",)
INSTALL = "pip install . in the checkout"
OPTIONS = ("cpu", "reference", "general", "triton", "cuda")


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    import mtml

    backend = next(iter(options), "auto")
    maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss, backend=backend)

    def backward() -> Tensor:
        loss: Tensor = maml.meta_loss(*data).mean()
        loss.backward()
        return loss

    return stored_grads(w, net, data, backward)
