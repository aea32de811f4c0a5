"""vmap or a loop over the tasks: a rule where one of them cannot be had, and a measurement where both can.

On a CPU the loop is several times faster for convolutions (vmap turns per-task filters into grouped convolutions) and
several times slower for small dense networks, so neither is a default. The measurement runs one meta-step of each on
detached copies of all tensors: no gradient, no buffer and no random number of the caller is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mtml_kernels._general_state import (
    batch_norm_mode,
    call,
    fresh_buffers,
    notice_recomputing,
    tracks,
    written_buffers,
)
from mtml_kernels._general_task import TaskRule
from mtml_kernels._transforms import is_forward_mode
from mtml_kernels.checks import check_initialised
from mtml_kernels.general import GeneralPlan, general_inner_loop

__all__ = ["Probe", "choose", "probe"]

ENOUGH = 2.0  # seconds: a first run this long is measurement enough; vmap's first costs about one second by itself
FEW = 4  # the loop's time is proportional to the number of tasks: so many tell it

# vmap's rule for the backward of these computes the weight's gradient as sum grad * (x - mean) * rstd from the mean and
# rstd that the forward returned, whose own derivative formulas drop what arrives at those two outputs: under
# vmap(grad(...)) they count as constants, and every derivative of that gradient is wrong without a word (torch 2.13:
# by 1e-3 to 10 relative). Without vmap, without a weight, with running statistics, and in first order it is right, as
# native_group_norm's formula is throughout.
NORMS = {
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}


class Probe(NamedTuple):
    """What one forward of one task showed."""

    output: tuple[int, ...] | None  # its shape; None if it is no tensor
    written: tuple[str, ...]  # buffers that the model wrote to
    recomputes: bool  # activation checkpointing was at work
    norm: str | None  # a normalisation that vmap differentiates twice wrongly


class _NoticeNorms(TorchDispatchMode):
    """Within it, `found` names the last operation of `NORMS` that ran with a weight and statistics of its own."""

    found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in NORMS:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            if given.get("weight") is not None and given.get("training", True):
                self.found = name
        return func(*args, **(kwargs or {}))


@contextmanager
def _same_random_numbers(data: Any) -> Iterator[None]:
    """Whatever is drawn within is drawn again after it."""
    devices = {t.device for t in pytree.tree_leaves(data) if isinstance(t, Tensor) and t.device.type != "cpu"}
    kinds = {device.type for device in devices}
    with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kinds.pop() if kinds else "cuda"):
        yield


def _explain_failure(error: RuntimeError, x: Any, model: nn.Module) -> None:
    """Turn PyTorch's words for an input of the wrong dtype into ours; anything else is left to be raised as it is."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
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
        _same_random_numbers(x),
        torch.enable_grad(),  # without it nothing is checkpointed
        batch_norm_mode(model, batch_norm),
        notice_recomputing() as recomputing,
        _NoticeNorms() as norms,
    ):
        before = {name: value.clone() for name, value in buffers.items()}
        try:
            output = call(model, {**(tensors or {}), **buffers}, first)
        except RuntimeError as error:
            _explain_failure(error, x, model)
            raise
    written = () if any(b.is_meta for b in buffers.values()) else written_buffers(before, buffers)
    shape = tuple(output.shape) if isinstance(output, Tensor) else None
    return Probe(shape, written, bool(recomputing), norms.found)


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), value)


def _meta_step(rule: TaskRule, plan: GeneralPlan, args: tuple[Any, ...]) -> None:
    """One forward and backward on copies, for its time alone."""
    theta, rates, data, weights = _detached(args)
    fixed = {name: p.detach().requires_grad_(p.requires_grad) for name, p in rule.model.named_parameters()}
    fixed.update(fresh_buffers(rule.model))
    result = general_inner_loop(rule, plan, theta, rates, data, weights, fixed)
    value = result.loss if result.loss is not None else result.support_losses
    leaves = [t for t in pytree.tree_leaves((theta, rates, data, fixed)) if isinstance(t, Tensor) and t.requires_grad]
    if leaves and value.requires_grad:
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)


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
    with _same_random_numbers(args):
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
    if batch_norm == "track" and tracks(rule.model):
        reason = "batch_norm='track' folds the statistics in task after task"
        return GeneralPlan("loop", reason, batch_norm, recomputes=recomputes)
    if recomputes:
        return GeneralPlan("loop", "the model checkpoints its activations", batch_norm, written, True)
    if written:
        names = ", ".join(written[:3])
        return GeneralPlan(
            "loop", f"the model writes to its buffers ({names}); each task gets copies", batch_norm, written
        )
    tensors = [t for t in pytree.tree_leaves(data) if isinstance(t, Tensor)]
    if tensors[0].shape[0] == 1:
        return GeneralPlan("loop", "there is one task", batch_norm)
    if found is not None and found.norm and not rule.first_order and torch.is_grad_enabled():
        reason = f"PyTorch's vmap gives wrong second derivatives through {found.norm} with a weight"
        return GeneralPlan("loop", reason, batch_norm)
    transformed = torch._C._functorch.maybe_current_level() is not None or is_forward_mode()
    if transformed or any(t.is_meta for t in tensors):
        return GeneralPlan("vmap", "nothing can be measured inside a torch.func transform", batch_norm)
    return _measure(rule, batch_norm, (dict(theta), list(rates), dict(data), weights))
