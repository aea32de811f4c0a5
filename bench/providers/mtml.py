"""This project: ``mtml.MAML(...).meta_loss(batch).mean().backward()``. An option is a backend: ``mtml:general``.

``mtml:weights`` and ``mtml:low_rank``: with each task's own weights, or with shared ones and low-rank corrections,
where a cost model would choose. The first runs a model of one linear layer over its weights instead of in Gram form.
``mtml:cuda``: the whole meta-step as one launch, of the models that a thread block can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bench.providers.base import Prepared, Unavailable, stored_grads
from bench.workloads import Data, Workload

REQUIRES = ("mtml",)
INSTALL = "pip install . in the checkout"
OPTIONS = ("cpu", "torch", "reference", "general", "triton", "cuda", "weights", "low_rank")


def prepare(w: Workload, net: nn.Module, data: Data, options: frozenset[str]) -> Prepared:
    import mtml

    layers = [m for m in net.modules() if not list(m.children())]
    if "weights" in options and len(layers) == 1 and isinstance(layers[0], nn.Linear):
        return _head_weights(w, net, data, layers[0])
    option = next(iter(options), "auto")
    backend = f"cpu:{option}" if option in ("weights", "low_rank") else option
    maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss, backend=backend)

    def backward() -> Tensor:
        loss: Tensor = maml.meta_loss(*data).mean()
        loss.backward()
        return loss

    return stored_grads(w, net, data, _or_unavailable(backward) if option == "cuda" else backward)


def _or_unavailable(backward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a backend refuses is no failure: not every model fits a thread block, nor every build has CUDA code."""
    from mtml_kernels import BackendUnavailable

    def run() -> Tensor:
        try:
            return backward()
        except BackendUnavailable as error:
            raise Unavailable(str(error).partition(" There is: ")[0]) from error  # less the menu of other backends

    return run


def _head_weights(w: Workload, net: nn.Module, data: Data, head: nn.Linear) -> Prepared:
    """``head_inner_loop`` in its weight form."""
    from mtml_kernels import head_inner_loop

    sx, sy, qx, qy = data
    options: dict[str, Any] = {"steps": w.steps, "loss": w.loss, "query_labels": qy, "form": "weight"}

    def backward() -> Tensor:
        loss: Tensor = head_inner_loop(sx, sy, qx, head.weight, head.bias, w.lr, **options).loss.mean()
        loss.backward()
        return loss

    return stored_grads(w, net, data, backward)
