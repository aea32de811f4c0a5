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
from mtml_kernels.native import head_inner_loop as native_head
from mtml_kernels.ops.head_inner_loop_checks import check_arguments, check_cotangents, check_ranks
from mtml_kernels.ops.inner_loop_backends import _own_memory, _recording
from mtml_kernels.reference.head_inner_loop import gram_form
from mtml_kernels.registry import REFERENCE, Backend, Registry
from mtml_kernels.schema.head_inner_loop import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    Cotangents,
    HeadArgs,
    HeadOutputs,
    empty_outputs,
    no_dtype_but_floats,
    parse_options,
    wanted,
)
from mtml_kernels.transforms import OpLibrary, abstract, has_tangents, no_rule
from mtml_kernels.triton.backends import register_head_inner_loop
from mtml_kernels.triton.head_inner_loop.policy import refusal

__all__ = ["BACKENDS", "backend_for", "head_inner_loop_call"]

WAY_OUT = 'mtml.MAML(head, ..., backend="general") on the features, which is made of PyTorch operations.'
ONCE = f"mtml::head_inner_loop is differentiable once, and its gradient was differentiated again. Way out: {WAY_OUT}"
UNDER_FUNC = no_rule("head_inner_loop", WAY_OUT)

BACKENDS = Registry("head_inner_loop")


# --- backends: forward(*HeadArgs) -> HeadOutputs; backward(cotangents, HeadArgs, carry) -> 5 gradients or None --------


def _run_reference(a: HeadArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sets = (a.support, a.labels, a.query, a.query_labels)
    masks = (a.support_mask, a.query_mask)
    return gram_form(*sets, a.weight, a.bias, a.rates, *masks, parse_options(a.options))


def _reference_forward(*args: Any) -> HeadOutputs:
    a = HeadArgs(*args)
    with _recording(), torch.no_grad():
        results = _run_reference(a)
    inputs = [t for t in a[:9] if isinstance(t, Tensor)]
    loss, logits, support_losses, coefficients = (_own_memory(t, inputs) for t in results)
    return loss, logits, support_losses, coefficients, a.weight.new_empty(0)


def _reference_backward(cotangents: Cotangents, a: HeadArgs, carry: Tensor) -> list[Tensor | None]:
    with _recording():
        leaves = [t if t is None else t.detach().requires_grad_(bool(a.needs >> i & 1)) for i, t in enumerate(a[:5])]
        results = _run_reference(HeadArgs._make((*leaves, *a[5:])))
        pairs = [(o, g) for o, g in zip(results, cotangents, strict=True) if g is not None and o.requires_grad]
        asked = [t for t in leaves if t is not None and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if pairs:
            found = torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
    inputs = [t for t in (*a[:5], *cotangents) if t is not None]
    own = iter(
        [torch.zeros_like(t) if g is None else _own_memory(g, inputs) for t, g in zip(asked, found, strict=True)]
    )
    return [None if t is None or not t.requires_grad else next(own) for t in leaves]


BACKENDS.register(
    Backend("cpu", native.availability, native_head.head_forward, native_head.head_backward, no_dtype_but_floats)
)
register_head_inner_loop(BACKENDS)
BACKENDS.register(Backend(REFERENCE, lambda: None, _reference_forward, _reference_backward))


# --- the registered ops -----------------------------------------------------------------------------------------------

_lib = OpLibrary(WAY_OUT)
_lib.define(FORWARD_SCHEMA)
_lib.define(BACKWARD_SCHEMA)


def _forward_impl(*args: Any) -> HeadOutputs:
    check_arguments(HeadArgs(*args[:-1]))
    outputs: HeadOutputs = BACKENDS.named(args[-1]).forward(*args[:-1])
    return outputs


def _forward_fake(*args: Any) -> HeadOutputs:
    a = HeadArgs(*args[:-1])
    check_ranks(a)
    return empty_outputs(a, args[-1] != REFERENCE)


def _contiguous(grad: Tensor | None) -> Tensor | None:
    """Cotangents of a sum are expanded (stride 0); a backend reads plain memory."""
    return grad if grad is None else grad.resolve_neg().contiguous()


def _backward_impl(*args: Any) -> list[Tensor]:
    a = HeadArgs(*args[4:-2])
    check_arguments(a)
    check_cotangents(a, args[:4], args[-2])
    cotangents = tuple(_contiguous(g) for g in args[:4])
    grads = BACKENDS.named(args[-1]).backward(cotangents, a, _contiguous(args[-2]))
    return [g for g in grads if g is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    a = HeadArgs(*args[4:-2])
    check_ranks(a)
    return [t.new_empty(t.shape) for t in wanted(a)]


def _gradients_by_op(a: HeadArgs, carry: Tensor, backend: str, cotangents: Sequence[Any]) -> list[Tensor | None]:
    """The five gradients through the backward op, whose own derivative raises."""
    grads = iter(torch.ops.mtml.head_inner_loop_backward(*cotangents, *a, carry, backend))
    return [next(grads) if a.needs >> i & 1 else None for i in range(5)]


def _check_no_gradient(a: HeadArgs) -> None:
    for name in ("labels", "query_labels", "support_mask", "query_mask"):
        tensor = getattr(a, name)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but head_inner_loop gives gradients to the features, the weight, the bias and "
                f"the rates only. Pass {name}.detach(), or {WAY_OUT}"
            )


def _needs(a: HeadArgs) -> int:
    return sum(t.requires_grad << i for i, t in enumerate(a[:5]) if t is not None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: HeadOutputs) -> None:
    a = HeadArgs(*inputs[:-1])
    _check_no_gradient(a)
    if _needs(a) & ~a.needs:
        raise ValueError(f"mtml::head_inner_loop: inputs that require grad need their bits in `needs`, got {a.needs}")
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*a[:9], output[4])
    ctx.fixed = (a.options, a.needs, inputs[-1])


def _op_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    options, needs, backend = ctx.fixed
    *tensors, carry = ctx.saved_tensors
    found = _gradients_by_op(HeadArgs._make((*tensors, options, needs)), carry, backend, grads[:4])
    return (*found, *(None for _ in range(7)))


def _raise_once(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(ONCE)


_lib.impl("head_inner_loop", _forward_impl, "CompositeExplicitAutograd")
_lib.impl("head_inner_loop_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("mtml::head_inner_loop", _forward_fake, lib=_lib)
torch.library.register_fake("mtml::head_inner_loop_backward", _backward_fake, lib=_lib)
torch.library.register_autograd("mtml::head_inner_loop", _op_backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("mtml::head_inner_loop_backward", _raise_once, lib=_lib)


# --- the eager path ---------------------------------------------------------------------------------------------------


class HeadInnerLoop(torch.autograd.Function):
    """The backend's forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, fixed: tuple[Backend, HeadArgs], *tensors: Tensor) -> tuple[Tensor, ...]:
        """`fixed` = (backend, arguments); `tensors` = the first five of them, which autograd tracks."""
        backend, a = fixed
        *outputs, carry = backend.forward(*a)
        ctx.fixed = (a.options, a.needs, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *a[5:9], carry)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, needs, backend = ctx.fixed
        *tensors, carry = ctx.saved_tensors
        a = HeadArgs._make((*tensors, options, needs))
        if torch.is_grad_enabled() or abstract(*grads):  # create_graph=True, or no plain cotangents
            return (None, *_gradients_by_op(a, carry, backend.name, grads))
        return (None, *backend.backward(tuple(_contiguous(g) for g in grads), a, carry))


def _resolved_name(backend: str, device_type: str, dtype: torch.dtype) -> str:
    return BACKENDS.resolve(backend, device_type, dtype).name


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


_resolved_name._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in ops/inner_loop.py


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
        loss, logits, support_losses, coefficients = HeadInnerLoop.apply((chosen, a), *a[:5])
    else:
        loss, logits, support_losses, coefficients, _ = chosen.forward(*a)
    return loss, logits, support_losses, coefficients
