"""`mtml::head_inner_loop`: K gradient steps of a linear head on given features, for a batch of tasks, as one operation.

The loop lives in the Gram matrix of each task's support features (reference/head_inner_loop.py has the formulas): no
weight of a task is formed. As for `mtml::inner_loop` there are two doors, an autograd.Function for eager code and the
registered op for whatever traces; both are differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels import native
from mtml_kernels.native.head_inner_loop import head_backward, head_forward
from mtml_kernels.ops.common import contiguous, own_memory, recording, resolved_name_in
from mtml_kernels.ops.head_inner_loop_checks import check_arguments, check_cotangents, check_ranks
from mtml_kernels.ops.registration import Rules, register_op
from mtml_kernels.reference.head_inner_loop import gram_form
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schema.dtypes import cpu_supports
from mtml_kernels.schema.head_inner_loop import (
    BACKWARD_SCHEMA,
    FIXED,
    FORWARD_SCHEMA,
    Cotangents,
    HeadArgs,
    HeadOutputs,
    empty_outputs,
    parse_options,
    wanted,
)
from mtml_kernels.transforms import abstract, has_tangents, no_rule
from mtml_kernels.triton import backends as triton
from mtml_kernels.triton.head_inner_loop.policy import refusal

__all__ = ["BACKENDS", "backend_for", "head_inner_loop_call"]

WAY_OUT = 'mtml.MAML(head, ..., backend="general") on the features, which is made of PyTorch operations.'
ONCE = f"mtml::head_inner_loop is differentiable once, and its gradient was differentiated again. Way out: {WAY_OUT}"
UNDER_FUNC = no_rule("head_inner_loop", WAY_OUT)

BACKENDS = Registry("head_inner_loop")


# --- backends: forward(HeadArgs) -> HeadOutputs; backward(cotangents, HeadArgs, carry) -> 5 gradients or None ---------


def _run_reference(a: HeadArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sets = (a.support, a.labels, a.query, a.query_labels)
    masks = (a.support_mask, a.query_mask)
    return gram_form(*sets, a.weight, a.bias, a.rates, *masks, parse_options(a.options))


def _reference_forward(a: HeadArgs) -> HeadOutputs:
    with recording(), torch.no_grad():
        results = _run_reference(a)
    inputs = [t for t in (*a.differentiable, *a.fixed) if t is not None]
    loss, logits, support_losses, coefficients = (own_memory(t, inputs) for t in results)
    return loss, logits, support_losses, coefficients, a.weight.new_empty(0)


def _reference_backward(cotangents: Cotangents, a: HeadArgs, carry: Tensor) -> list[Tensor | None]:
    with recording():
        pairs = zip(a.differentiable, a.asks(), strict=True)
        leaves = [t if t is None else t.detach().requires_grad_(asked) for t, asked in pairs]
        results = _run_reference(HeadArgs._make((*leaves, *a.fixed, a.options, a.needs)))
        given = [(o, g) for o, g in zip(results, cotangents, strict=True) if g is not None and o.requires_grad]
        asked = [t for t in leaves if t is not None and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if given:
            found = torch.autograd.grad([o for o, _ in given], asked, [g for _, g in given], allow_unused=True)
    inputs = [t for t in (*a.differentiable, *cotangents) if t is not None]
    own = iter([torch.zeros_like(t) if g is None else own_memory(g, inputs) for t, g in zip(asked, found, strict=True)])
    return [None if t is None or not t.requires_grad else next(own) for t in leaves]


BACKENDS.register(Backend("cpu", native.availability, head_forward, head_backward, cpu_supports))
BACKENDS.register(triton.HEAD_INNER_LOOP)
BACKENDS.register(Backend(REFERENCE, lambda: None, _reference_forward, _reference_backward))

_resolved_name = resolved_name_in(BACKENDS)


# --- the registered ops -----------------------------------------------------------------------------------------------


def _forward(*args: Any) -> HeadOutputs:
    *given, backend = args
    a = HeadArgs(*given)
    check_arguments(a)
    outputs: HeadOutputs = BACKENDS.named(backend).forward(a)
    return outputs


def _forward_fake(*args: Any) -> HeadOutputs:
    *given, backend = args
    a = HeadArgs(*given)
    check_ranks(a)
    return empty_outputs(a, backend != REFERENCE)


def _backward_arguments(
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_coefficients: Tensor | None,
    *args: Any,
) -> tuple[Cotangents, HeadArgs, Tensor, str]:
    *given, carry, backend = args
    return (grad_loss, grad_logits, grad_support_losses, grad_coefficients), HeadArgs(*given), carry, backend


def _backward(*args: Any) -> list[Tensor]:
    cotangents, a, carry, backend = _backward_arguments(*args)
    check_arguments(a)
    check_cotangents(a, cotangents, carry)
    grads = BACKENDS.named(backend).backward(tuple(map(contiguous, cotangents)), a, contiguous(carry))
    return [g for g in grads if g is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    _, a, _, _ = _backward_arguments(*args)
    check_ranks(a)
    return [t.new_empty(t.shape) for t in wanted(a)]


def _gradients_by_op(a: HeadArgs, carry: Tensor, backend: str, cotangents: Sequence[Any]) -> list[Tensor | None]:
    """The five gradients through the backward op, whose own derivative raises."""
    grads = iter(torch.ops.mtml.head_inner_loop_backward(*cotangents, *a, carry, backend))
    return [next(grads) if a.needs >> i & 1 else None for i in range(len(a.differentiable))]


def _check_no_gradient(a: HeadArgs) -> None:
    for name, tensor in zip(FIXED, a.fixed, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but head_inner_loop gives gradients to the features, the weight, the bias and "
                f"the rates only. Pass {name}.detach(), or {WAY_OUT}"
            )


def _needs(a: HeadArgs) -> int:
    return sum(t.requires_grad << i for i, t in enumerate(a.differentiable) if t is not None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: HeadOutputs) -> None:
    *given, backend = inputs
    a = HeadArgs(*given)
    _check_no_gradient(a)
    if _needs(a) & ~a.needs:
        raise ValueError(f"mtml::head_inner_loop: inputs that require grad need their bits in `needs`, got {a.needs}")
    *_, carry = output
    ctx.mark_non_differentiable(carry)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*a.differentiable, *a.fixed, carry)
    ctx.static = (a.options, a.needs, backend)


def _gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    options, needs, backend = ctx.static
    *tensors, carry = ctx.saved_tensors
    *cotangents, _ = grads
    found = _gradients_by_op(HeadArgs._make((*tensors, options, needs)), carry, backend, cotangents)
    return (*found, *(None for _ in FIXED), None, None, None)  # and options, needs, backend


_rules = Rules(_forward, _forward_fake, _backward, _backward_fake, _setup_context, _gradient)
_library = register_op((FORWARD_SCHEMA, BACKWARD_SCHEMA), _rules, once=ONCE, way_out=WAY_OUT)


# --- the eager path ---------------------------------------------------------------------------------------------------


class HeadInnerLoop(torch.autograd.Function):
    """The backend's forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, a: HeadArgs, backend: Backend, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` = the differentiable ones, which autograd tracks."""
        *outputs, carry = backend.forward(a)
        ctx.static = (a.options, a.needs, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *a.fixed, carry)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, needs, backend = ctx.static
        *tensors, carry = ctx.saved_tensors
        a = HeadArgs._make((*tensors, options, needs))
        if torch.is_grad_enabled() or abstract(*grads):  # create_graph=True, or no plain cotangents
            return (None, None, *_gradients_by_op(a, carry, backend.name, grads))
        return (None, None, *backend.backward(tuple(map(contiguous, grads)), a, carry))


def backend_for(backend: str, weight: Tensor, support: int) -> str:
    """The name of the backend that runs a head of this weight [C, D] on S = `support` samples a task.

    Raises:
        BackendUnavailable: the backend asked for cannot run here, or has no place for heads of this shape.
    """
    name = _resolved_name(backend, weight.device.type, weight.dtype)
    if name != "triton":
        return name
    why = refusal(support, weight.shape[0], weight.itemsize)
    return name if why is None else BACKENDS.instead(backend, name, why)


def head_inner_loop_call(a: HeadArgs, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the op by the cheapest door that is right here; arguments already checked, `needs` is found here.

    Returns:
        loss [T] ([0] without query labels), logits [T, Q, C], support_losses [K, T], coefficients [T, 1 or 2, C, S]:
        task t's weight is u_K W - coefficients[t, 0] F_s, its bias v_K b - coefficients[t, -1] 1.

    Raises:
        ValueError: labels or masks require grad (nothing here would give them one).
        BackendUnavailable: the backend asked for cannot run here.
        RuntimeError: called under a torch.func transform.
    """
    if torch.is_grad_enabled():
        _check_no_gradient(a)
        a = a._replace(needs=_needs(a))
    name = backend_for(backend, a.weight, a.support.shape[1])
    if is_compiling() or torch._C._len_torch_dispatch_stack():
        loss, logits, support_losses, coefficients, _ = torch.ops.mtml.head_inner_loop(*a, name)
        return loss, logits, support_losses, coefficients
    if torch._C._are_functorch_transforms_active() or has_tangents(a):
        raise RuntimeError(UNDER_FUNC)
    chosen = BACKENDS.named(name)
    if a.needs:
        loss, logits, support_losses, coefficients = HeadInnerLoop.apply(a, chosen, *a.differentiable)
    else:
        loss, logits, support_losses, coefficients, _ = chosen.forward(a)
    return loss, logits, support_losses, coefficients
