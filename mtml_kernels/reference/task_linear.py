"""`task_linear` in plain PyTorch: y[t] = f(x[t] W[t]^T + b[t])."""

from __future__ import annotations

import torch
from torch import Tensor

from mtml_kernels.program.activations import Act
from mtml_kernels.schema.task_linear import NO_ACTIVATION, LinearForm

__all__ = ["activate", "slope_times", "task_linear"]


def activate(z: Tensor, form: LinearForm) -> Tensor:
    """f(z)"""
    return z if form.activation == NO_ACTIVATION else Act(form.activation).info.formula(z, form.c0, form.c1)


def slope_times(z: Tensor, d: Tensor, form: LinearForm) -> Tensor:
    """d f'(z), itself differentiable any number of times to z and d."""
    product: Tensor = torch.func.vjp(lambda z: activate(z, form), z)[1](d)[0]
    return product


def task_linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> Tensor:
    """y [T, N, O] of x [T, N, I], weight [T or 1, O, I], bias [T or 1, O] or None."""
    z = x @ weight.mT
    return activate(z if bias is None else z + bias.unsqueeze(1), form)
