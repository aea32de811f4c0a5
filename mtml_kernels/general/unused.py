"""Which adapted tensors an inner loss leaves out, seen by one backward pass before the first step of the first task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml_kernels.batch_norm import step_rows
from mtml_kernels.general.modules import fresh_buffers, same_random_numbers
from mtml_kernels.general.private import Private
from mtml_kernels.general.task import TaskRule

__all__ = ["refuse_unused"]


def refuse_unused(
    rule: TaskRule, theta: Mapping[str, Tensor], data: Mapping[str, Any], batch_norm: str, recomputes: bool
) -> None:
    """Raise RuntimeError where the model's output depends on a tensor of `theta` and the inner loss does not.

    Such a tensor would stay as it is, which may be meant (a head for the query loss) or not (the wrong output went
    into the loss). What no output depends on cannot be adapted by any loss: it is left alone here.
    """
    task = {name: pytree.tree_map(lambda t: t[0].detach(), value) for name, value in data.items()}
    own = {name: value.detach().requires_grad_() for name, value in theta.items()}
    tensors = {**fresh_buffers(rule.model), **step_rows(rule.model, 0, False), **own}
    with same_random_numbers(task["sx"]), torch.enable_grad():
        output = Private(rule.model, batch_norm, recomputes)(tensors, task["sx"])
        loss = rule.loss(output, task.get("sy"), task.get("support_mask"))
        unused = _without_gradient([loss], own)
        ends = pytree.tree_leaves(output)
        missing = _without_gradient(ends, {name: own[name] for name in unused}) if unused else []
    lost = [name for name in unused if name not in missing]
    if lost:
        listed = ", ".join(map(repr, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise RuntimeError(
            f"loss: the inner loss does not depend on the adapted parameters {listed}, though the model's output does; "
            "pass allow_unused=True to leave them as they are, name those to adapt in params=, or let the loss read "
            "what they compute"
        )


def _without_gradient(ends: list[Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that none of `ends` depends on."""
    found = [end for end in ends if isinstance(end, Tensor) and end.requires_grad]
    if not found:
        return list(tensors)
    seeds = [torch.ones_like(end) for end in found]
    grads = torch.autograd.grad(found, list(tensors.values()), seeds, retain_graph=True, allow_unused=True)
    return [name for name, grad in zip(tensors, grads, strict=True) if grad is None]
