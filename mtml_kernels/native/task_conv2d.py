"""The compiled engine's `task_conv2d`: addresses in, tensors out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtml_kernels.native import engine
from mtml_kernels.native.tensors import addresses_of, checked, recycled, recycled_like
from mtml_kernels.schema.dtypes import DTYPES
from mtml_kernels.schema.task_conv2d import ConvForm

__all__ = ["conv2d_backward", "conv2d_forward"]

_NAMES = ("x", "weight", "bias", "y", "grad")


def _run(tensors: list[Tensor | None], form: ConvForm, results: list[Tensor | None], backward: bool) -> None:
    """`tensors`: x, weight, bias, y and grad; on the way there y is written."""
    x, weight, bias, *_ = tensors
    assert x is not None and weight is not None
    _, addresses = held = checked(_NAMES.__getitem__, tensors, x.dtype)
    sizes = [DTYPES[x.dtype], torch.get_num_threads(), *x.shape[:3], weight.shape[1], form.groups]
    sizes += [weight.shape[0], 1 if bias is None else bias.shape[0], *x.shape[3:], *form.outputs(x, weight)]
    sizes += [*weight.shape[3:], *form.stride, *form.padding, *form.dilation]
    engine().task_conv2d(sizes, [*addresses, *addresses_of(results)], backward)
    del held  # until here: copies that were made for the call


def conv2d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm) -> Tensor:
    """y [T, N, O, OH, OW]; x [T, N, C, H, W], weight [T or 1, O, C / groups, kh, kw], bias [T or 1, O]."""
    shape = form.output_shape(x, weight)
    y = recycled(math.prod(shape), x.dtype).view(shape)
    if y.numel():
        _run([x, weight, bias, y, None], form, [None, None, None], False)
    return y


def conv2d_backward(
    d: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, form: ConvForm, needs: int
) -> list[Tensor | None]:
    """[dx, dw, db] of d [T, N, O, OH, OW], None where `needs` does not ask."""
    given = (x, weight, bias)
    found = [recycled_like(t) if t is not None and needs >> i & 1 else None for i, t in enumerate(given)]
    if d.numel():
        _run([x, weight, bias, None, d], form, found, True)
        return found
    return [g if g is None else g.zero_() for g in found]
