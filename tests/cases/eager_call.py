"""A call of `inner_loop` through the door of eager code, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases.engine import Evaluated
from torch import Tensor

from mtml_kernels.ops.inner_loop import inner_loop_call
from mtml_kernels.schema.inner_loop import DATA, DATA_NEEDS, LISTS, InnerLoopArgs

__all__ = ["Cotangents", "eager"]

Cotangents = Sequence[Tensor | None]


def eager(a: InnerLoopArgs, cotangents: Cotangents, backend: str) -> Evaluated:
    """Outputs, and gradients of what `a.needs` names."""
    lists: dict[str, list[Tensor]] = {
        name: [t.detach().requires_grad_(bool(a.needs & 1 << i) and t.is_floating_point()) for t in getattr(a, name)]
        for i, name in enumerate(LISTS)
    }
    data = dict.fromkeys(DATA)
    for name, bit in zip(DATA, DATA_NEEDS, strict=True):
        t = getattr(a, name)
        data[name] = None if t is None else t.detach().requires_grad_(bool(a.needs & bit) and t.is_floating_point())
    rule = {"hyper": lists.pop("hyper"), "moments": lists.pop("moments")}
    loss, output, support, kept = inner_loop_call(
        a.spec, **lists, **data, step_weights=a.step_weights, backend=backend, **rule
    )
    outputs = [loss, output, support, *kept]
    leaves = [t for group in (*lists.values(), *rule.values(), data.values()) for t in group if _is_leaf(t)]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None and o.requires_grad]
    grads: Sequence[Tensor] = [torch.zeros_like(t) for t in leaves]
    if pairs and leaves:
        ends, seeds = [o for o, _ in pairs], [c for _, c in pairs]
        grads = torch.autograd.grad(ends, leaves, seeds, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(grads)


def _is_leaf(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad
