"""`mtml::multihead_loss`: the losses of several heads and their gradients at the logits, in one pass.

Three doors lead to the same backends: eager code takes `Eager` (small heads of plain tensors `Fast`, where the backend
has a lane for them); torch.func transforms take `Losses`, whose vmap rule makes stacks of equal heads of the batch;
whatever traces takes the registered op. Forward mode, and a transform that is traced, take the PyTorch formulas
themselves.

The gradient comes with the loss; backward passes it on, times the cotangent. Where that pass is differentiated itself,
`_Gradients` takes its place, whose own derivative is that of PyTorch operations (`gradient_formula`): any number of
times. The registered op is differentiable once and raises beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.ops.multihead_loss_autograd import Eager, Losses, fast_losses
from mtml_kernels.ops.multihead_loss_backends import BACKENDS, check_labels, reference_call
from mtml_kernels.ops.multihead_loss_checks import check_arguments, check_gradients, gathered, specifications
from mtml_kernels.ops.registration import Rules, register_op
from mtml_kernels.registry import Backend
from mtml_kernels.schema.multihead_loss import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    HeadsCall,
    HeadTensors,
    Plain,
    decode,
    make_call,
)
from mtml_kernels.transforms import is_forward_mode

__all__ = ["BACKENDS", "multihead_loss_call"]

ONCE = (
    "mtml::multihead_loss is differentiable once under torch.compile, and its gradient was differentiated again. Way "
    "out: call multihead_loss outside torch.compile, where it is differentiable any number of times."
)
WAY_OUT = "mtml_kernels.multihead_loss, which every transform differentiates any number of times."


# --- the registered ops -----------------------------------------------------------------------------------------------


def _forward(
    logits: list[Tensor],
    targets: list[Tensor],
    weights: list[Tensor],
    places: list[int],
    heads: str,
    differentiate: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    tensors = gathered(logits, targets, weights, places)
    call = make_call(*check_arguments(tensors, heads), tensors)
    losses, gradients = BACKENDS.named(backend).forward(call, tensors, differentiate)
    shared = len({g.untyped_storage().data_ptr() for g in gradients}) < len(gradients)
    return losses, [g.clone() for g in gradients] if shared else gradients  # an op's results may not alias


def _counts(logits: Sequence[Tensor], heads: str) -> list[int]:
    _, stacked = decode(heads)
    return [z.shape[0] if stack else 1 for z, stack in zip(logits, stacked, strict=True)]


def _forward_fake(
    logits: list[Tensor],
    targets: list[Tensor],
    weights: list[Tensor],
    places: list[int],
    heads: str,
    differentiate: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    specifications(heads, len(logits))
    losses = logits[0].new_empty(sum(_counts(logits, heads)))
    return losses, [z.new_empty(z.shape) for z in logits] if differentiate else []


def _backward(
    cotangent: Tensor, gradients: list[Tensor], logits: list[Tensor], counts: list[int], backend: str
) -> list[Tensor]:
    check_gradients(cotangent, gradients, logits, counts)
    return BACKENDS.named(backend).backward(gradients, cotangent, counts)


def _backward_fake(cotangent: Tensor, gradients: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(g) for g in gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    logits, targets, weights, _, heads, differentiate, backend = inputs
    if not differentiate:
        raise ValueError("mtml::multihead_loss: logits that require grad need differentiate=True")
    _, gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients, *logits)
    ctx.counts, ctx.backend = _counts(logits, heads), backend
    ctx.others = len(targets), len(weights)


def _gradient(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    n = len(ctx.counts)
    gradients = torch.ops.mtml.multihead_loss_backward(cotangent, saved[:n], saved[n:], ctx.counts, ctx.backend)
    targets, weights = ctx.others
    # "no gradient" for a list of numbers is None, for an empty list an empty list: it might have held tensors
    return (gradients, [None] * targets, [None] * weights, None if weights else [], None, None, None)


_rules = Rules(_forward, _forward_fake, _backward, _backward_fake, _setup_context, _gradient)
_library = register_op((FORWARD_SCHEMA, BACKWARD_SCHEMA), _rules, once=ONCE, way_out=WAY_OUT)


# --- the choice of the door -------------------------------------------------------------------------------------------


def multihead_loss_call(call: HeadsCall, tensors: HeadTensors, backend: Backend, plain: Plain | None = None) -> Tensor:
    """The losses by the cheapest door that is right here; the tensors are checked and on the backend's device.

    `plain`: what the backend's fast lane has read of them.
    """
    tracing = is_compiling() or torch._C._len_torch_dispatch_stack()
    transformed = torch._C._are_functorch_transforms_active()
    if is_forward_mode() or (transformed and tracing):  # neither the Function nor the op has a rule for these
        if not tracing:
            check_labels(call, tensors)
        return reference_call(call, tensors)
    if tracing:
        others = tensors.weights()
        places = [i for i, t in enumerate(others) if t is not None]
        wanted = torch.is_grad_enabled() and any(z.requires_grad for z in tensors.logits)
        lists = (list(tensors.logits), list(tensors.targets), [t for t in others if t is not None])
        losses, _ = torch.ops.mtml.multihead_loss(*lists, places, call.text, wanted, backend.name)
        return losses
    if transformed:
        return Losses.apply(call, backend, *tensors.flat())
    wanted = torch.is_grad_enabled() and any(z.requires_grad for z in tensors.logits)
    if plain is not None and call.small:
        if wanted:
            return fast_losses(call, backend, tensors, plain, *tensors.logits)
        losses, _ = backend.fast_lane.forward(call, plain, False)
        return losses
    if wanted:
        return Eager.apply(call, backend, tensors, *tensors.logits)
    losses, _ = backend.forward(call, tensors, False)
    return losses
