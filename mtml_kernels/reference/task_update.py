"""`task_update` in plain PyTorch: the update rule of `reference.update` on the tensors of all tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.reference.update import update
from mtml_kernels.schema.task_update import UpdateArgs, UpdateForm
from mtml_kernels.schema.update import HYPERS

__all__ = ["task_update"]


def task_update(a: UpdateArgs, form: UpdateForm) -> list[Tensor]:
    """The parameters after one step, then the moments, those of the first moment first."""
    numbers = dict(zip(HYPERS, a.hyper.unbind(), strict=True))
    n = len(a.params)
    moments = [
        a.moments[m * n : (m + 1) * n] if a.moments else [torch.zeros_like(p) for p in a.params]
        for m in range(len(form.spec.moments))
    ]
    after, kept = update(form.spec, numbers, a.params, a.grads, a.rates, moments, form.step, tasks=True)
    return [*after, *(t for plane in kept for t in plane)]
