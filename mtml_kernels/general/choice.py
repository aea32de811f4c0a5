"""vmap or a loop over the tasks: a rule where one of them cannot be had, and a measurement where both can.

On a CPU the loop is several times faster for convolutions (vmap turns per-task filters into grouped convolutions) and
several times slower for small dense networks, so neither is a default. The measurement runs one meta-step of each on
detached copies of all tensors: no gradient, no buffer and no random number of the caller is touched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtml_kernels.batch_norm import tracks
from mtml_kernels.checks import check_initialised
from mtml_kernels.general.formulas import formulas
from mtml_kernels.general.guard import Notice, check_functions, explain
from mtml_kernels.general.loop import GeneralPlan, general_inner_loop
from mtml_kernels.general.modules import fresh_buffers, notice_recomputing, same_random_numbers, written_buffers
from mtml_kernels.general.private import Private
from mtml_kernels.general.task import TaskRule
from mtml_kernels.precision import first_floating
from mtml_kernels.transforms import is_forward_mode

__all__ = ["Probe", "choose", "probe"]

ENOUGH = 2.0  # seconds: a first run this long is measurement enough; vmap's first costs about one second by itself
FEW = 4  # the loop's time is proportional to the number of tasks: so many tell it


class Probe(NamedTuple):
    """What one forward of one task showed."""

    output: tuple[int, ...] | None  # its shape; None if it is no tensor
    written: tuple[str, ...]  # buffers that the model wrote to
    recomputes: bool  # activation checkpointing was at work
    norm: str | None = None  # a normalisation that no formula can stand in for


def _explain_failure(error: RuntimeError, x: Any, model: nn.Module) -> None:
    """Turn PyTorch's words for an input of the wrong dtype into ours; anything else is left to be raised as it is."""
    params = list(model.parameters())
    wanted = first_floating(params).dtype if params else None
    for index, tensor in enumerate(t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)):
        if wanted is None or tensor.dtype == wanted:
            continue
        label = "sx" if isinstance(x, Tensor) else f"sx[{index}]"
        names = tuple(str(d).removeprefix("torch.") for d in (wanted, tensor.dtype))
        raise TypeError(
            f"{label}: expected {names[0]}, the dtype of the model's parameters, got {names[1]}; convert it with "
            f".to(torch.{names[0]}) or convert the model (the model itself said: {str(error).splitlines()[0]})"
        ) from error


def probe(model: nn.Module, x: Any, batch_norm: str, tensors: Mapping[str, Tensor] | None = None) -> Probe:
    """One forward of the first task on copies of the buffers.

    Raises:
        ValueError: the model has uninitialised (lazy) parameters.
        TypeError: an input has a dtype that the model cannot take.
    """
    check_initialised(model)
    first = pytree.tree_map(lambda t: t[0].detach(), x)
    buffers = fresh_buffers(model)
    with (
        same_random_numbers(x),
        torch.enable_grad(),  # without it nothing is checkpointed
        formulas(),
        notice_recomputing() as recomputing,
        Notice() as notice,
    ):
        before = {name: value.clone() for name, value in buffers.items()}
        try:
            output = Private(model, batch_norm)({**(tensors or {}), **buffers}, first)
        except RuntimeError as error:
            _explain_failure(error, x, model)
            raise
    written = () if any(b.is_meta for b in buffers.values()) else written_buffers(before, buffers)
    shape = tuple(output.shape) if isinstance(output, Tensor) else None
    return Probe(shape, written, recomputing.found, notice.norm)


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), value)


def _meta_step(rule: TaskRule, plan: GeneralPlan, args: tuple[Any, ...]) -> Tensor:
    """The losses of one forward, and a backward, on copies."""
    theta, rates, data, weights = _detached(args)
    fixed = {name: p.detach().requires_grad_(p.requires_grad) for name, p in rule.model.named_parameters()}
    fixed.update(fresh_buffers(rule.model))
    result = general_inner_loop(rule, plan, theta, rates, data, weights, fixed)
    value = result.loss if result.loss is not None else result.support_losses
    leaves = [t for t in pytree.tree_leaves((theta, rates, data, fixed)) if isinstance(t, Tensor) and t.requires_grad]
    if leaves and value.requires_grad:
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return value


def _seconds(rule: TaskRule, plan: GeneralPlan, args: tuple[Any, ...]) -> float:
    times = []
    for _ in range(2):
        start = time.perf_counter()
        _meta_step(rule, plan, args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if times[-1] > ENOUGH:
            break
    return min(times)


def _few(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], float]:
    """The arguments with a few tasks of the batch, and what share of it they are."""
    theta, rates, data, weights = args
    tasks = next(t for t in pytree.tree_leaves(data) if isinstance(t, Tensor)).shape[0]
    return (theta, rates, pytree.tree_map(lambda t: t[:FEW], data), weights), min(FEW, tasks) / tasks


def _measure(rule: TaskRule, batch_norm: str, args: tuple[Any, ...]) -> GeneralPlan:
    loop, batched = GeneralPlan("loop", "", batch_norm), GeneralPlan("vmap", "", batch_norm)
    if batch_norm == "track":
        # nothing tracks here, or the rule would have decided; the copies must not be handed to layers as their own
        loop, batched = replace(loop, batch_norm="module"), replace(batched, batch_norm="module")
    with same_random_numbers(args):
        try:
            vmap_time = _seconds(rule, batched, args)
        except Exception as error:  # whatever vmap cannot do (data-dependent shapes, .item(), custom functions)
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return GeneralPlan("loop", f"vmap cannot run this model or loss ({text[:160]})", batch_norm)
        few, share = _few(args)
        loop_time = _seconds(rule, loop, few) / share
    times = f"vmap {1e3 * vmap_time:.2f} ms, loop {1e3 * loop_time:.2f} ms"
    return GeneralPlan(
        "vmap" if vmap_time < loop_time else "loop", f"measured once for these shapes: {times}", batch_norm
    )


def _tried(rule: TaskRule, plan: GeneralPlan, args: tuple[Any, ...]) -> GeneralPlan:
    """The plan for the loop, with what one meta-step of one task shows of the operations that run in model, loss and
    update rule.

    Operations that `formulas` replaces do not show. A norm that does runs in TorchScript, or in the backward of an
    autograd.Function: there PyTorch is right up to the second order, but not under vmap.
    """
    theta, rates, data, weights = args
    one = (theta, rates, pytree.tree_map(lambda t: t[:1], data), weights)
    still = replace(plan, mode="loop", batch_norm="module" if plan.batch_norm == "track" else plan.batch_norm)
    with same_random_numbers(args), Notice() as notice:
        try:
            check_functions(_meta_step(rule, still, one))
        except Exception as error:  # what we have no words for says itself what it is, in the call or its backward
            first = pytree.tree_map(lambda t: t[0].detach(), data["sx"])
            why = explain(error, rule.model, {**theta, **fresh_buffers(rule.model)}, first)
            if why:
                return replace(plan, reason=why.partition(", because ")[2].partition(", and ")[0], blocked=why)
    if notice.norm is None:
        return plan
    once = (
        f"meta_loss: expected to be differentiated once: {notice.norm} runs in TorchScript or in the backward of "
        "an autograd.Function, and PyTorch's derivatives of it are wrong from the third order on; call it elsewhere"
    )
    return replace(plan, reason=f"PyTorch's vmap gives wrong second derivatives through {notice.norm}", once=once)


def _by_rule(
    rule: TaskRule, data: Mapping[str, Any], batch_norm: str, written: tuple[str, ...], recomputes: bool
) -> GeneralPlan | None:
    """The loop, where vmap cannot be had or cannot help."""
    plan = GeneralPlan("loop", "", batch_norm, written, recomputes, rule.first_order)
    if batch_norm == "track" and tracks(rule.model):
        reason = "batch_norm='track' folds the statistics in task after task"
        return replace(plan, reason=reason, stateful=())
    if recomputes:
        return replace(plan, reason="the model checkpoints its activations")
    if written:
        names = ", ".join(written[:3])
        return replace(plan, reason=f"the model writes to its buffers ({names}); each task gets copies")
    if next(t for t in pytree.tree_leaves(data) if isinstance(t, Tensor)).shape[0] == 1:
        return replace(plan, reason="there is one task")
    return None


def choose(
    rule: TaskRule,
    theta: Mapping[str, Tensor],
    rates: Sequence[Tensor],
    data: Mapping[str, Any],
    weights: Sequence[Any] | None = None,
    batch_norm: str = "module",
    found: Probe | None = None,
) -> GeneralPlan:
    """The faster way to run these tasks; arguments as for `general_inner_loop`.

    `found` is what `probe` found. Call it once per signature: it runs the tasks both ways.
    """
    written, recomputes = (found.written, found.recomputes) if found is not None else ((), False)
    args = (dict(theta), list(rates), dict(data), weights)
    plan = _by_rule(rule, data, batch_norm, written, recomputes)
    tensors = [t for t in pytree.tree_leaves(data) if isinstance(t, Tensor)]
    blind = torch._C._functorch.maybe_current_level() is not None or is_forward_mode()
    blind = blind or any(t.is_meta for t in tensors)
    if blind:
        reason = "nothing can be measured inside a torch.func transform"
        mode = "loop" if found is not None and found.norm and not rule.first_order else "vmap"
        return plan or GeneralPlan(mode, reason, batch_norm, first_order=rule.first_order)
    if not rule.first_order and torch.is_grad_enabled() and tensors[0].shape[0]:
        tried = _tried(rule, plan or GeneralPlan("loop", "", batch_norm), args)
        if tried.blocked or tried.once:
            return tried
    return plan or replace(_measure(rule, batch_norm, args), first_order=rule.first_order)
