"""This project: ``mtml.MAML(...).meta_loss(batch).mean().backward()``. An option is a backend: ``mtml:general``.

``mtml:weight``: a model of one linear layer by the engine's loop over its weights, where the Gram form would run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.providers.base import Prepared, Unavailable, stored_grads
from bench.workloads import Data, Workload

REQUIRES = ("mtml",)
INSTALL = "pip install . in the checkout"
OPTIONS = ("cpu", "reference", "general", "triton", "cuda", "weight")


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    import mtml

    if "weight" in options:
        return _weight(w, net, data)
    backend = next(iter(options), "auto")
    maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss, backend=backend)

    def backward() -> Tensor:
        loss: Tensor = maml.meta_loss(*data).mean()
        loss.backward()
        return loss

    return stored_grads(w, net, data, backward)


def _weight(w: Workload, net: nn.Module, data: Data) -> Prepared:
    """``head_inner_loop`` in its weight form."""
    from mtml_kernels import head_inner_loop

    layers = [m for m in net.modules() if not list(m.children())]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
        raise Unavailable("mtml:weight runs models of one linear layer")
    head = layers[0]
    sx, sy, qx, qy = data
    options: dict[str, Any] = {"steps": w.steps, "loss": w.loss, "query_labels": qy, "form": "weight"}

    def backward() -> Tensor:
        loss: Tensor = head_inner_loop(sx, sy, qx, head.weight, head.bias, w.lr, **options).loss.mean()
        loss.backward()
        return loss

    return stored_grads(w, net, data, backward)
