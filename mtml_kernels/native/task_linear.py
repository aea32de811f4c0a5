"""The compiled engine's `task_linear`: addresses in, tensors out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.native import engine
from mtml_kernels.native.tensors import addresses_of, checked, recycled, recycled_like
from mtml_kernels.reference.task_linear import slope_times, task_linear
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.task_linear import LinearForm

__all__ = ["linear_backward", "linear_forward"]

_NAMES = ("x", "weight", "bias", "y", "grad")


def _run(tensors: list[Tensor | None], form: LinearForm, results: list[Tensor | None], backward: bool) -> None:
    """`tensors`: x, weight, bias, y and grad; on the way there y is written."""
    x, weight, bias, *_ = tensors
    assert x is not None and weight is not None
    _, addresses = held = checked(_NAMES.__getitem__, tensors, x.dtype)
    sizes = [DTYPES[x.dtype], torch.get_num_threads(), *x.shape, weight.shape[1], weight.shape[0]]
    sizes += [1 if bias is None else bias.shape[0], form.activation]
    engine().task_linear(sizes, form.c0, form.c1, [*addresses, *addresses_of(results)], backward)
    del held  # until here: copies that were made for the call


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm) -> Tensor:
    """y [T, N, O]; x [T, N, I], weight [T or 1, O, I], bias [T or 1, O]."""
    shape = form.output_shape(x, weight)
    y = recycled(math.prod(shape), x.dtype).view(shape)
    if y.numel() == 0 or x.numel() == 0:
        x, weight, bias = _held(x, weight, bias)
        return y.copy_(task_linear(x, weight, bias, form))  # a sum over no inputs, or nothing at all
    _run([x, weight, bias, y, None], form, [None, None, None], False)
    return y


def linear_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm, needs: int
) -> list[Tensor | None]:
    """[dx, dw, db] of d [T, N, O], None where `needs` does not ask."""
    given = (x, weight, bias)
    found = [recycled_like(t) if t is not None and needs >> i & 1 else None for i, t in enumerate(given)]
    if d.numel() == 0 or x.numel() == 0:
        return _of_nothing(d, y, x, weight, bias, form, found)
    _run([x, weight, bias, y, d], form, found, True)
    return found


def _held(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """The same, where there is memory behind them: PyTorch itself would read on."""
    return checked(_NAMES.__getitem__, [x, weight, bias], x.dtype)[0]


def _of_nothing(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: LinearForm, found: list[Tensor | None]
) -> list[Tensor | None]:
    """Where x or y has no elements: zeros, but for the gradient of a bias under no inputs."""
    for g in found:
        if g is not None:
            g.zero_()
    if bias is not None and found[2] is not None and d.numel():
        x, weight, row = _held(x, weight, bias)
        z = task_linear(x.detach(), weight.detach(), row.detach(), form.plain)
        g = slope_times(z, d, form).sum(1)
        found[2].copy_(g if bias.shape[0] == g.shape[0] else g.sum(0, keepdim=True))
    return found
