"""The backends of `mtml::multihead_loss`.

    forward(call, tensors, differentiate) -> (losses [sum of counts], [gradient of each loss at its logits])
    backward(gradients, cotangent, counts) -> [gradients times their heads' cotangents]
    hand_out(gradients, cotangent, counts) -> the same (see `Backend`)

with a `HeadsCall` and `HeadTensors` (any strides). Gradients are contiguous, none where they are not asked for, and
`backward` leaves those it is given as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels import native
from mtml_kernels.checks import label_message
from mtml_kernels.native.multihead_loss import FAST_LANE, multihead_forward
from mtml_kernels.native.tensors import recycled_like
from mtml_kernels.ops.common import recording, resolved_name_in
from mtml_kernels.reference.multihead_loss import multihead_loss as reference_losses
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schema.dtypes import cpu_supports
from mtml_kernels.schema.multihead_loss import HeadsCall, HeadTensors, is_ids
from mtml_kernels.triton import backends as triton

__all__ = ["BACKENDS", "along", "check_labels", "reference_call", "resolve", "scaled", "unstack"]

BACKENDS = Registry("multihead_loss")

_resolved_name = resolved_name_in(BACKENDS)


def resolve(backend: str, device_type: str, dtype: torch.dtype) -> Backend:
    """`BACKENDS.resolve`, of which torch.compile sees the result alone."""
    if is_compiling():
        return BACKENDS.named(_resolved_name(backend, device_type, dtype))
    return BACKENDS.resolve(backend, device_type, dtype)


def unstack(call: HeadsCall, tensors: HeadTensors) -> tuple[list[Any], ...]:
    """Every head by itself: the columns of `tensors` and the losses' specifications."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    specs = []
    for spec, stack, count, *head in zip(call.specs, call.stacked, call.counts, *tensors, strict=True):
        for i in range(count):
            for column, t in zip(columns, head, strict=True):
                column.append(t if t is None or not stack else t[i])
            specs.append(spec)
    return (*columns, specs)


def reference_call(call: HeadsCall, tensors: HeadTensors) -> Tensor:
    """The losses by the PyTorch formulas: differentiable any number of times, by every tensor."""
    logits, targets, own, classes, pos, specs = unstack(call, tensors)
    return reference_losses(logits, targets, specs, own, classes, pos)


def check_labels(call: HeadsCall, tensors: HeadTensors) -> None:
    """ValueError where a class id is out of range (the compiled engine looks for itself)."""
    for i, (spec, z, y, stack) in enumerate(
        zip(call.specs, tensors.logits, tensors.targets, call.stacked, strict=True)
    ):
        if not is_ids(spec, y) or y.is_meta:
            continue
        while torch._C._functorch.is_functorch_wrapped_tensor(y):  # the values of a batch are those below
            y = torch._C._functorch.get_unwrapped(y)
        classes = z.shape[1:][spec.class_dim if spec.class_dim < 0 else 1] if stack else z.shape[spec.class_dim]
        wrong = ((y < 0) | (y >= classes)) & (y != spec.ignore_index)
        if bool(wrong.any()):
            row = int(wrong.flatten().nonzero()[0])
            label = int(y.flatten()[row])
            raise ValueError(label_message(f"targets[{i}]", row, label, classes, spec.ignore_index))


def _reference_forward(call: HeadsCall, tensors: HeadTensors, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
    check_labels(call, tensors)
    if not differentiate:
        return reference_call(call, tensors).detach(), []
    with recording():
        leaves = [z.detach().requires_grad_() for z in tensors.logits]
        losses = reference_call(call, tensors._replace(logits=leaves))
        return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))


def along(gradient: Tensor, cotangent: Tensor) -> Tensor:
    """A head's cotangent [1], or those of a stack, as its gradient can be multiplied by them."""
    return cotangent[0] if cotangent.shape[0] == 1 else cotangent.reshape(-1, *(1,) * (gradient.ndim - 1))


def scaled(gradient: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of a head, or of a stack of them, times its cotangents, in new memory."""
    by = along(gradient, cotangent)
    if gradient.device.type != "cpu" or gradient.is_meta:
        return gradient * by
    return torch.mul(gradient, by, out=recycled_like(gradient))


def _backward(gradients: Sequence[Tensor], cotangent: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return [scaled(g, c) for g, c in zip(gradients, cotangent.split(list(counts)), strict=True)]


BACKENDS.register(
    Backend(
        "cpu",
        available=native.availability,
        forward=multihead_forward,
        backward=_backward,
        supports=cpu_supports,
        fast_lane=FAST_LANE,
    )
)
BACKENDS.register(triton.MULTIHEAD_LOSS)
BACKENDS.register(Backend(REFERENCE, available=lambda: None, forward=_reference_forward, backward=_backward))
