"""The losses of tasks from outputs that are there already, and the checks of their targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from mtml_kernels.checks import check_class_ids, check_target
from mtml_kernels.losses import IGNORED, LossSpec, Opaque
from mtml_kernels.losses.task import TaskLoss, refuse_several

__all__ = ["check_targets", "task_losses"]


def task_losses(loss: TaskLoss, output: Any, qy: Any, query_mask: Tensor | None, tasks: int) -> Tensor:
    """The loss of every task [T] of outputs [T, Q, ...]; qy may be None for a loss of the output alone."""
    if loss.spec is not None:
        rows = (output, qy) if query_mask is None else (output, qy, query_mask)
        result: Tensor = vmap(lambda *row: loss(*row))(*rows)
        return result

    def of_task(t: int) -> tuple[Any, ...]:
        found: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda part: part[t], (output, qy, query_mask))
        return found

    return torch.stack([loss(*of_task(t)) for t in range(tasks)])


def check_targets(name: str, loss: LossSpec | Opaque, output: Any, target: Any) -> None:
    """Raise ValueError or TypeError for targets that a loss known by name cannot judge outputs [T, N, ...] by."""
    if not isinstance(loss, LossSpec):
        return
    refuse_several("loss", loss.kind, output)
    check_target(name, loss.kind, target, tuple(output.shape))
    if loss.kind == "cross_entropy" and not target.is_floating_point():
        check_class_ids(name, target, output.shape[2], IGNORED)
