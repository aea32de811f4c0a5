"""`mtml::inner_loop`: K gradient steps for each of a batch of tasks, and their exact meta-gradient, as one operation.

Two doors lead to the same backends. Eager code takes `InnerLoop`, an autograd.Function that calls the backend
directly; `torch.compile`, `torch.export` and anything that traces take the registered op. Both are differentiable
once: the gradient of the gradient raises, because a formula that is missing would otherwise be a silent zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.ops.inner_loop_checks import check_arguments, check_cotangents, check_ranks
from mtml_kernels.registry import Backend
from mtml_kernels.schema.inner_loop import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    InnerLoopArgs,
    InnerLoopSpec,
    Outputs,
    StaticValues,
    empty_outputs,
    flat_gradients,
    gradient_inputs,
    group_gradients,
    parse_spec,
    refuse_gradients,
    wanted_gradients,
)
from mtml_kernels.transforms import OpLibrary, abstract, has_tangents, no_rule

__all__ = ["BACKENDS", "InnerLoop", "InnerLoopSpec", "inner_loop_call"]

GENERAL = (
    "the general path, which is made of PyTorch operations and differentiable any number of times: "
    'mtml.MAML(..., backend="general").'
)
ONCE = f"mtml::inner_loop is differentiable once, and its meta-gradient was differentiated again. Way out: {GENERAL}"
UNDER_FUNC = no_rule("inner_loop", GENERAL)

_N_ARGS = len(InnerLoopArgs._fields)
_N_COTANGENTS = 5  # grad_loss, grad_output, grad_support_losses, grad_adapted, grad_adapted_given

Result = tuple[Tensor, Tensor, Tensor, list[Tensor]]


# --- the registered ops --------------------------------------------------------------------------------------------

_lib = OpLibrary(GENERAL)
_lib.define(FORWARD_SCHEMA)
_lib.define(BACKWARD_SCHEMA)


def _forward_impl(*args: Any) -> Outputs:
    check_arguments(InnerLoopArgs(*args[:-1]))
    return BACKENDS.named(args[-1]).forward(*args[:-1])


def _forward_fake(*args: Any) -> Outputs:
    a = InnerLoopArgs(*args[:-1])
    check_ranks(a)
    carry_shapes = BACKENDS.named(args[-1]).carry_shapes
    return empty_outputs(a, carry_shapes(*a) if a.needs and carry_shapes else [])


def _contiguous(grad: Tensor | None) -> Tensor | None:
    """Cotangents of a sum are expanded (stride 0); a backend reads plain memory."""
    return grad if grad is None else grad.resolve_neg().contiguous()


def _backward_impl(*args: Any) -> list[Tensor]:
    a = InnerLoopArgs(*args[_N_COTANGENTS : _N_COTANGENTS + _N_ARGS])
    backend = BACKENDS.named(args[-1])
    check_arguments(a)
    check_cotangents(a, args[:3], args[3], args[4], args[-2], backend.carry_shapes(*a) if backend.carry_shapes else [])
    given = iter(args[3])
    grad_adapted = [_contiguous(next(given)) if flag else None for flag in args[4]]
    cotangents = (_contiguous(args[0]), _contiguous(args[1]), _contiguous(args[2]), grad_adapted)
    carry = [_contiguous(t) for t in args[-2]]
    return flat_gradients(a, backend.backward(*cotangents, *a, carry))


def _backward_fake(*args: Any) -> list[Tensor]:
    a = InnerLoopArgs(*args[_N_COTANGENTS : _N_COTANGENTS + _N_ARGS])
    return [t.new_empty(t.shape) for t in gradient_inputs(a)]


# --- what the backward needs from the forward: one layout of saved tensors for both doors ---------------------------


class _Plan(NamedTuple):
    """Where each argument lies among the saved tensors: params, lr, support_x, query_x, the five others, carry."""

    static: StaticValues
    needs: int
    backend: Backend
    lr: int  # index of the first learning rate, and so on
    support_x: int
    query_x: int
    others: int

    def arguments(self, saved: Sequence[Tensor]) -> tuple[Any, ...]:
        """The op's arguments and the carry, from the saved tensors."""
        static, at = self.static, self.others
        query_y, support_mask, query_mask, step_weights = saved[at + 1 : at + 5]
        return (
            list(saved[: self.lr]),
            static[0],
            list(saved[self.support_x : self.query_x]),
            saved[at],
            list(saved[self.query_x : at]),
            query_y,
            support_mask,
            query_mask,
            list(saved[self.lr : self.support_x]),
            step_weights,
            *static[1:],
            self.needs,
            list(saved[at + 5 :]),
        )


def _plan(static: StaticValues, needs: int, backend: Backend, *groups: Sequence[Tensor]) -> _Plan:
    lr = len(groups[0])
    support_x = lr + len(groups[1])
    query_x = support_x + len(groups[2])
    return _Plan(static, needs, backend, lr, support_x, query_x, query_x + len(groups[3]))


def _gradients_by_op(plan: _Plan, saved: Sequence[Tensor], cotangents: Sequence[Any]) -> list[list[Tensor | None]]:
    """The four groups of gradients through the backward op, whose own derivative raises."""
    *fixed, grad_adapted = cotangents
    given = [g for g in grad_adapted if g is not None]
    *args, carry = plan.arguments(saved)
    a = InnerLoopArgs(*args)
    flags = [g is not None for g in grad_adapted]
    grads = torch.ops.mtml.inner_loop_backward(*fixed, given, flags, *a, carry, plan.backend.name)
    return group_gradients(a, grads)


# --- autograd of the registered ops ---------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    a = InnerLoopArgs(*inputs[:-1])
    refuse_gradients(a.support_y, a.query_y, a.support_mask, a.query_mask, a.step_weights)
    missing = wanted_gradients(a.params, a.lr, a.support_x, a.query_x) & ~a.needs
    if missing:
        raise ValueError(
            f"mtml::inner_loop: inputs that require grad need the bits {missing} in `needs`, got needs={a.needs} "
            "(1 params, 2 lr, 4 support_x, 8 query_x)"
        )
    carry = output[4]
    groups = (a.params, a.lr, a.support_x, a.query_x)
    others = (a.support_y, a.query_y, a.support_mask, a.query_mask, a.step_weights)
    ctx.mark_non_differentiable(*carry)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(t for group in groups for t in group), *others, *carry)
    ctx.plan = _plan(a.static(), a.needs, BACKENDS.named(inputs[-1]), *groups)


def _op_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    groups = _gradients_by_op(ctx.plan, ctx.saved_tensors, grads[:4])
    # "No gradient" for a list of numbers is None, for an empty list an empty list: it might have held tensors.
    none: list[Any] = [[] if value == [] else None for value in ctx.plan.static]
    return (groups[0], none[0], groups[2], None, groups[3], None, None, None, groups[1], None, *none[1:], None, None)


def _raise_once(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(ONCE)


_lib.impl("inner_loop", _forward_impl, "CompositeExplicitAutograd")
_lib.impl("inner_loop_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("mtml::inner_loop", _forward_fake, lib=_lib)
torch.library.register_fake("mtml::inner_loop_backward", _backward_fake, lib=_lib)
torch.library.register_autograd("mtml::inner_loop", _op_backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("mtml::inner_loop_backward", _raise_once, lib=_lib)


# --- the eager path -------------------------------------------------------------------------------------------------


class InnerLoop(torch.autograd.Function):
    """The backend's forward and backward without the dispatcher between (it costs more than a small inner loop)."""

    @staticmethod
    def forward(ctx: Any, call: tuple[_Plan, tuple[Any, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """`call` = (plan, op arguments); `tensors` = params, lr, support_x, query_x, which autograd tracks."""
        plan, args = call
        loss, output, support_losses, adapted, carry = plan.backend.forward(*args)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, args[3], args[5], args[6], args[7], args[9], *carry)
        return (loss, output, support_losses, *adapted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        if torch.is_grad_enabled() or abstract(*grads):  # create_graph=True, or no plain cotangents
            params, lr, support_x, query_x = _gradients_by_op(plan, ctx.saved_tensors, (*grads[:3], grads[3:]))
        else:
            cotangents = [_contiguous(g) for g in grads]
            params, lr, support_x, query_x = plan.backend.backward(
                cotangents[0], cotangents[1], cotangents[2], cotangents[3:], *plan.arguments(ctx.saved_tensors)
            )
        return (None, *params, *lr, *support_x, *query_x)


def _resolved_name(backend: str, device_type: str, dtype: torch.dtype) -> str:
    return BACKENDS.resolve(backend, device_type, dtype).name


# What torch.compiler.assume_constant_result does, less its import of torch._dynamo (half a second): the choice reads
# the environment and may warn, which a traced function cannot.
_resolved_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def inner_loop_call(
    spec: InnerLoopSpec,
    params: list[Tensor],
    support_x: list[Tensor],
    support_y: Tensor,
    query_x: list[Tensor],
    query_y: Tensor | None,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    lr: list[Tensor],
    step_weights: Tensor | None,
    backend: str = "auto",
) -> Result:
    """Runs the op by the cheapest door that is right here; arguments as in the schema, already checked.

    Returns:
        loss [T] ([0] without query targets), output [T, Q, out], support_losses [K, T], and of each adapted
        parameter [T, *shape] (keep 1), [K+1, T, *shape] (keep 2) or nothing (keep 0).

    Raises:
        ValueError: targets, masks or step_weights require grad (nothing here would give them one).
        BackendUnavailable: the backend asked for cannot run here.
        RuntimeError: called under a torch.func transform.
    """
    needs = 0
    if torch.is_grad_enabled():
        refuse_gradients(support_y, query_y, support_mask, query_mask, step_weights)
        needs = wanted_gradients(params, lr, support_x, query_x)
    tracing = is_compiling()
    static = parse_spec(spec.text) if tracing else spec.values
    adapted, *rest = static
    targets_and_masks = (query_y, support_mask, query_mask)
    args = (params, adapted, support_x, support_y, query_x, *targets_and_masks, lr, step_weights, *rest, needs)
    like = params[0]
    if tracing or torch._C._len_torch_dispatch_stack():
        name = _resolved_name(backend, like.device.type, like.dtype)
        return torch.ops.mtml.inner_loop(*args, name)[:4]
    if torch._C._are_functorch_transforms_active() or has_tangents(args):
        raise RuntimeError(UNDER_FUNC)
    chosen = BACKENDS.resolve(backend, like.device.type, like.dtype)
    if needs:
        plan = _plan(static, needs, chosen, params, lr, support_x, query_x)
        out = InnerLoop.apply((plan, args), *params, *lr, *support_x, *query_x)
        return out[0], out[1], out[2], list(out[3:])
    return chosen.forward(*args)[:4]
