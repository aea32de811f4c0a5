"""`mtml::inner_loop`: K gradient steps for each of a batch of tasks, and their exact meta-gradient, as one operation.

Two doors lead to the same backends. Eager code takes `InnerLoop`, an autograd.Function that calls the backend
directly, or where the backend has it the fast lane for tensors that need only to be read; `torch.compile`,
`torch.export` and anything that traces take the registered op. All are differentiable once: the gradient of the
gradient raises, because a formula that is missing would otherwise be a silent zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.ops.common import contiguous, resolved_name_in
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.ops.inner_loop_checks import check_arguments, check_cotangents, check_ranks
from mtml_kernels.ops.inner_loop_lane import Lane, is_open, picking, run
from mtml_kernels.ops.registration import Rules, register_op
from mtml_kernels.registry import Backend
from mtml_kernels.schema.inner_loop import (
    BACKWARD_SCHEMA,
    DATA,
    DATA_NEEDS,
    FIXED,
    FORWARD_SCHEMA,
    NEED_HYPER,
    NEED_LR,
    NEED_MOMENTS,
    NEED_PARAMS,
    NEED_QUERY_X,
    NEED_SUPPORT_X,
    Grads,
    InnerLoopArgs,
    InnerLoopSpec,
    Outputs,
    empty_outputs,
    flat_gradients,
    group_gradients,
    parse_spec,
)
from mtml_kernels.transforms import abstract, has_tangents, no_rule

__all__ = ["BACKENDS", "InnerLoop", "InnerLoopSpec", "inner_loop_call", "lane_of", "task_gradients_call"]

GENERAL = (
    "the general path, which is made of PyTorch operations and differentiable any number of times: "
    'mtml.MAML(..., backend="general").'
)
REFUSED = (
    "inner_loop: step_weights requires grad, but the fused inner loop gives it none. Pass step_weights.detach(), or "
    'take the general path: mtml.MAML(..., backend="general").'
)
ONCE = f"mtml::inner_loop is differentiable once, and its meta-gradient was differentiated again. Way out: {GENERAL}"
UNDER_FUNC = no_rule("inner_loop", GENERAL)

Result = tuple[Tensor, Tensor, Tensor, list[Tensor]]

_resolved_name = resolved_name_in(BACKENDS)


# --- gradients: which are asked for, which cannot be had -----------------------------------------------------------


_NEEDS = (NEED_PARAMS, NEED_LR, NEED_SUPPORT_X, NEED_QUERY_X, NEED_HYPER, NEED_MOMENTS)


def _wanted(step_weights: Tensor | None, data: Sequence[Tensor | None], *groups: Sequence[Tensor]) -> int:
    """The `needs` bits: which groups (params, lr, support_x, query_x, hyper, moments) and which of `DATA` have a tensor
    that requires grad.

    Raises:
        ValueError: the step weights require a gradient, which they would silently not get.
    """
    if step_weights is not None and step_weights.requires_grad:
        raise ValueError(REFUSED)
    needs = 0
    for bit, single in zip(DATA_NEEDS, data, strict=True):
        if single is not None and single.requires_grad:
            needs |= bit
    for bit, tensors in zip(_NEEDS, groups, strict=True):
        for tensor in tensors:
            if tensor.requires_grad:
                needs |= bit
                break
    return needs


# --- what the backward needs from the forward: one layout of saved tensors for both doors --------------------------


class SavedLayout(NamedTuple):
    """Where each argument lies among the saved tensors: the lists one after another, the single five, the carry."""

    spec: InnerLoopSpec
    needs: int
    backend: Backend
    n_params: int
    n_lr: int
    n_support_x: int
    n_query_x: int
    n_hyper: int
    n_moments: int

    def arguments(self, saved: Sequence[Tensor]) -> tuple[InnerLoopArgs, list[Tensor]]:
        """The arguments and the carry, from the saved tensors."""
        lr = self.n_params
        support_x = lr + self.n_lr
        query_x = support_x + self.n_support_x
        hyper = query_x + self.n_query_x
        moments = hyper + self.n_hyper
        single = moments + self.n_moments
        carry = single + len(DATA) + len(FIXED)
        support_y, query_y, support_mask, query_mask, step_weights = saved[single:carry]
        a = InnerLoopArgs(
            list(saved[:lr]),
            list(saved[lr:support_x]),
            list(saved[support_x:query_x]),
            list(saved[query_x:hyper]),
            list(saved[hyper:moments]),
            list(saved[moments:single]),
            support_y,
            query_y,
            support_mask,
            query_mask,
            step_weights,
            self.spec,
            self.needs,
        )
        return a, list(saved[carry:])


def _gradients_by_op(layout: SavedLayout, saved: Sequence[Tensor], cotangents: Sequence[Any]) -> list[Grads]:
    """The groups of gradients through the backward op, whose own derivative raises."""
    *fixed, grad_adapted = cotangents
    given = [g for g in grad_adapted if g is not None]
    flags = [g is not None for g in grad_adapted]
    a, carry = layout.arguments(saved)
    carry = carry if layout.backend.carry_shapes else []
    arguments = (*fixed, given, flags, *a.in_schema(a.spec.values), carry, layout.backend.name)
    return group_gradients(a, torch.ops.mtml.inner_loop_backward(*arguments))


# --- the registered ops --------------------------------------------------------------------------------------------


def _forward(*args: Any) -> Outputs:
    *given, backend = args
    a = InnerLoopArgs.of_schema(given)
    check_arguments(a)
    chosen = BACKENDS.named(backend)
    *outputs, carry = chosen.forward(a)
    return (*outputs, carry if chosen.carry_shapes else [])  # as the fake says


def _forward_fake(*args: Any) -> Outputs:
    *given, backend = args
    a = InnerLoopArgs.of_schema(given)
    check_ranks(a)
    carry_shapes = BACKENDS.named(backend).carry_shapes
    return empty_outputs(a, carry_shapes(a) if a.needs and carry_shapes else [])


def _backward(
    grad_loss: Tensor | None,
    grad_output: Tensor | None,
    grad_support_losses: Tensor | None,
    grad_adapted: list[Tensor],
    given: list[bool],
    *args: Any,
) -> list[Tensor]:
    *arguments, carry, name = args
    a, backend = InnerLoopArgs.of_schema(arguments), BACKENDS.named(name)
    check_arguments(a)
    fixed = (grad_loss, grad_output, grad_support_losses)
    check_cotangents(a, fixed, grad_adapted, given, carry, backend.carry_shapes(a) if backend.carry_shapes else [])
    rest = iter(grad_adapted)
    adapted = [contiguous(next(rest)) if flag else None for flag in given]
    grads = backend.backward(*map(contiguous, fixed), adapted, a, [contiguous(t) for t in carry])
    return flat_gradients(a, grads)


def _backward_fake(
    grad_loss: Any, grad_output: Any, grad_support_losses: Any, grad_adapted: Any, given: Any, *args: Any
) -> list[Tensor]:
    *arguments, _, _ = args
    a = InnerLoopArgs.of_schema(arguments)
    empty = [[None] * len(tensors) for _, tensors in a.groups]
    return [torch.empty_like(t) for t in flat_gradients(a, empty)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *given, backend = inputs
    a = InnerLoopArgs.of_schema(given)
    lists, data = _lists_and_data(a)
    missing = _wanted(a.step_weights, data, *lists) & ~a.needs
    if missing:
        raise ValueError(
            f"mtml::inner_loop: inputs that require grad need the bits {missing} in `needs`, got needs={a.needs} "
            f"({NEED_PARAMS} params, {NEED_LR} lr, {NEED_SUPPORT_X} support_x, {NEED_QUERY_X} query_x, "
            f"{NEED_HYPER} hyper, {NEED_MOMENTS} moments, {DATA_NEEDS} {', '.join(DATA)})"
        )
    *_, carry = output
    ctx.mark_non_differentiable(*carry)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(t for tensors in lists for t in tensors), *data, a.step_weights, *carry)
    ctx.layout = SavedLayout(a.spec, a.needs, BACKENDS.named(backend), *map(len, lists))


def _lists_and_data(a: InnerLoopArgs) -> tuple[tuple[list[Tensor], ...], tuple[Tensor | None, ...]]:
    """The groups that are lists, and `DATA`."""
    lists = (a.params, a.lr, a.support_x, a.query_x, a.hyper, a.moments)
    return lists, (a.support_y, a.query_y, a.support_mask, a.query_mask)


def _gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    *cotangents, _ = grads
    groups = _gradients_by_op(ctx.layout, ctx.saved_tensors, cotangents)
    params, lr, support_x, query_x, hyper, moments, *data = groups
    support_y, query_y, support_mask, query_mask = (group[0] if group else None for group in data)
    # "No gradient" for a list of numbers is None, for an empty list an empty list: it might have held tensors.
    none: list[list[Any] | None] = [[] if value == [] else None for value in ctx.layout.spec.values]
    adapted, *static = none
    sets = (support_x, support_y, query_x, query_y, support_mask, query_mask)
    return (params, adapted, *sets, lr, hyper, moments, None, *static, None, None)


_rules = Rules(_forward, _forward_fake, _backward, _backward_fake, _setup_context, _gradient)
_library = register_op((FORWARD_SCHEMA, BACKWARD_SCHEMA), _rules, once=ONCE, way_out=GENERAL)


# --- the eager path ------------------------------------------------------------------------------------------------


class InnerLoop(torch.autograd.Function):
    """The backend's forward and backward without the dispatcher between (it costs more than a small inner loop)."""

    @staticmethod
    def forward(ctx: Any, a: InnerLoopArgs, backend: Backend, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """`tensors` = the lists one after another and `DATA`, which autograd tracks."""
        loss, output, support_losses, adapted, carry = backend.forward(a)
        sizes = map(len, (a.params, a.lr, a.support_x, a.query_x, a.hyper, a.moments))
        ctx.layout = SavedLayout(a.spec, a.needs, backend, *sizes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, a.step_weights, *carry)
        return (loss, output, support_losses, *adapted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *_gradients(ctx.layout, ctx.saved_tensors, grads))


def _gradients(layout: SavedLayout, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
    """Of the lists one after another, and of `DATA`."""
    if torch.is_grad_enabled() or abstract(*grads):  # create_graph=True, or no plain cotangents
        loss, output, support_losses, *adapted = grads
        groups = _gradients_by_op(layout, saved, (loss, output, support_losses, adapted))
    else:
        loss, output, support_losses, *adapted = map(contiguous, grads)
        groups = layout.backend.backward(loss, output, support_losses, adapted, *layout.arguments(saved))
    *lists, sy, qy, sm, qm = groups
    data = (sy[0] if sy else None, qy[0] if qy else None, sm[0] if sm else None, qm[0] if qm else None)
    return [*(grad for group in lists for grad in group), *data]


_MAX_LANES = 512


def lane_of(chosen: Backend, a: InnerLoopArgs, form: bytes) -> Lane | None:
    """A backend's lane for calls of this form, as its lane has read it; None where they are not for it.

    Raises:
        ValueError: step_weights requires grad.
    """
    known, recording = chosen.fast_lane.calls, torch.is_grad_enabled()
    key = id(a.spec), recording, form
    if key not in known:
        if len(known) >= _MAX_LANES:
            known.clear()
        known[key] = a.spec, _new_lane(chosen, a, recording)  # the spec, so that its id stays its own
    found: Lane | None = known[key][1]
    return found


def _new_lane(chosen: Backend, a: InnerLoopArgs, recording: bool) -> Lane | None:
    lists, data = _lists_and_data(a)
    a = a._replace(needs=_wanted(a.step_weights, data, *lists) if recording else 0)
    call, tensors = chosen.fast_lane.make(a), a.tensors
    if call is None:
        return None
    layout = SavedLayout(a.spec, a.needs, chosen, *map(len, lists))
    wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad] if a.needs else []
    return Lane(call, partial(_gradients, layout), picking(wanted), len(tensors))


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
    hyper: Sequence[Tensor] = (),
    moments: Sequence[Tensor] = (),
) -> Result:
    """Runs the op by the cheapest door that is right here; arguments as in the schema, already checked.

    Returns:
        loss [T] ([0] without query targets), output [T, Q, out] (with QUERY_STEPS both [K+1, ...]), support_losses
        [K, T], and of each adapted parameter [T, *shape] (KEEP_LAST), [K+1, T, *shape] (KEEP_STEPS) or nothing
        (KEEP_NONE); with MOMENTS behind them the rule's moments, plane by plane.

    Raises:
        ValueError: step_weights requires grad (nothing here would give it one).
        BackendUnavailable: the backend asked for cannot run here.
        RuntimeError: called under a torch.func transform.
    """
    data = (support_y, query_y, support_mask, query_mask)
    lists = (params, lr, support_x, query_x, [*hyper], [*moments])
    like = params[0]
    if is_open():
        chosen = BACKENDS.resolve(backend, like.device.type, like.dtype)
        if chosen.fast_lane is not None:
            by_lane = _by_lane(chosen, InnerLoopArgs(*lists, *data, step_weights, spec, needs=0))
            if by_lane is not None:
                return by_lane
    needs = _wanted(step_weights, data, *lists) if torch.is_grad_enabled() else 0
    a = InnerLoopArgs(*lists, *data, step_weights, spec, needs)
    tracing = is_compiling()
    if tracing or torch._C._len_torch_dispatch_stack():
        static = parse_spec(spec.text) if tracing else spec.values
        name = _resolved_name(backend, like.device.type, like.dtype)
        loss, output, support_losses, kept, _ = torch.ops.mtml.inner_loop(*a.in_schema(static), name)
        return loss, output, support_losses, kept
    if torch._C._are_functorch_transforms_active() or has_tangents(a):
        raise RuntimeError(UNDER_FUNC)
    chosen = BACKENDS.resolve(backend, like.device.type, like.dtype)
    if needs:
        found = InnerLoop.apply(a, chosen, *params, *lr, *support_x, *query_x, *hyper, *moments, *data)
        loss, output, support_losses, *kept = found
    else:
        loss, output, support_losses, kept, _ = chosen.forward(a)
    return loss, output, support_losses, kept


def _by_lane(chosen: Backend, a: InnerLoopArgs) -> Result | None:
    """By the backend's fast lane; None where the call is not for it."""
    *tensors, _, _ = a
    plain = chosen.fast_lane.read(*tensors)
    lane = None if plain is None else lane_of(chosen, a, plain[0])
    if lane is None:
        return None
    loss, output, support_losses, *kept = run(lane, plain[1], a.tensors)
    return loss, output, support_losses, kept


def task_gradients_call(a: InnerLoopArgs, backend: str = "auto") -> tuple[Tensor, list[Tensor]]:
    """Every task's loss [T] and its own gradients, [T, *shape] of each parameter, in one pass.

    The spec has TASKS_APART. Nothing of the result can be differentiated again.
    """
    a = a._replace(needs=NEED_PARAMS)
    like = a.params[0]
    if is_compiling():
        name = _resolved_name(backend, like.device.type, like.dtype)
        return _task_gradients_by_op(a, name)
    chosen = BACKENDS.resolve(backend, like.device.type, like.dtype)
    with torch.no_grad():
        loss, _, _, _, carry = chosen.forward(a)
        found = chosen.backward(torch.ones_like(loss), None, None, [], a, carry)
    return loss, [grad for grad in found[0] if grad is not None]


def _task_gradients_by_op(a: InnerLoopArgs, backend: str) -> tuple[Tensor, list[Tensor]]:
    """The same by the registered ops, for what traces."""
    arguments = a.in_schema(parse_spec(a.spec.text))
    with torch.no_grad():
        loss, *_, carry = torch.ops.mtml.inner_loop(*arguments, backend)
        cotangents: tuple[Any, ...] = (torch.ones_like(loss), None, None, [], [])
        found = torch.ops.mtml.inner_loop_backward(*cotangents, *arguments, carry, backend)
    return loss, list(found)
