"""What the providers share: their result, and how gradients that ``.backward()`` stores are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads import Data, Workload, wanted

OWN = "mtml"
Result = tuple[Tensor, list[Tensor]]
"""The mean query loss, and its gradient in the order of ``workloads.wanted``."""


class Unavailable(RuntimeError):
    """A provider that cannot run here; the message says why and what would change that."""


def _as_result(value: Any) -> Result:
    loss, grads = value
    return loss, list(grads)


@dataclass(frozen=True)
class Prepared:
    """A provider bound to one workload: ``run`` is timed; ``result`` turns its value into tensors (not timed)."""

    run: Callable[[], Any]
    result: Callable[[Any], Result] = _as_result


def is_ours(provider: str) -> bool:
    """Whether a provider (options included) is this project's."""
    return provider.partition(":")[0] == OWN


def loss_of(w: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """The plain PyTorch loss of a workload."""
    return F.mse_loss if w.loss == "mse" else F.cross_entropy


def stored_grads(w: Workload, net: nn.Module, data: Data, backward: Callable[[], Tensor]) -> Prepared:
    """Wrap a provider that calls ``.backward()`` itself and returns the loss."""
    leaves = wanted(w, net.parameters(), data)

    def run() -> Result:
        for leaf in leaves:
            leaf.grad = None
        loss = backward().detach()
        grads = [leaf.grad for leaf in leaves]
        if any(grad is None for grad in grads):
            raise RuntimeError("a gradient is missing: backward() left .grad of a parameter or input at None")
        return loss, grads  # type: ignore[return-value]

    return Prepared(run)
