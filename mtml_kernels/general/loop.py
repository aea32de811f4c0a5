"""The general path's inner loop over a batch of tasks, as a plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from mtml_kernels.general.formulas import formulas
from mtml_kernels.general.guard import blocked, once_only
from mtml_kernels.general.modules import fresh_buffers
from mtml_kernels.general.private import Private
from mtml_kernels.general.task import TaskRule, run_task
from mtml_kernels.schema.inner_loop import KEEP_STEPS
from mtml_kernels.transforms import is_forward_mode

__all__ = ["GeneralPlan", "GeneralResult", "forward_tasks", "general_inner_loop"]


class GeneralResult(NamedTuple):
    """loss [T] and output [T, Q, ...] (None without a query set), support_losses [K, T], adapted by name.

    `adapted` has [T, *shape], or [K+1, T, *shape] where all steps were kept, or nothing.
    """

    loss: Tensor | None
    output: Any
    support_losses: Tensor
    adapted: dict[str, Tensor]
    moments: dict[str, Any] | None = None


@dataclass(frozen=True)
class GeneralPlan:
    """How to run the tasks: decided once per signature by `choose`, or by hand."""

    mode: str  # "vmap" or "loop"
    reason: str
    batch_norm: str = "module"
    stateful: tuple[str, ...] = ()  # buffers that a forward writes to: each task gets copies
    recomputes: bool = False  # the model checkpoints activations: each forward gets a copy that keeps its tensors
    first_order: bool = False  # no derivative beyond PyTorch's own kernels is asked for: no formulas in their place
    blocked: str = ""  # why there is no exact meta-gradient: what the backward raises
    once: str = ""  # why there is no derivative of the meta-gradient: what its backward raises

    def __post_init__(self) -> None:
        if self.mode not in ("vmap", "loop"):
            raise ValueError(f"mode: expected 'vmap' or 'loop', got {self.mode!r}")


def _in_transform() -> bool:
    """Are we in a torch.func transform of the caller's or in forward mode, where torch.autograd.grad does not work?"""
    return torch._C._functorch.maybe_current_level() is not None or is_forward_mode()


def _unbind(value: Any) -> list[Any]:
    """A pytree of tensors [T, ...] as T pytrees."""
    flat, spec = pytree.tree_flatten(value)
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*(t.unbind(0) for t in flat), strict=True)]


def _stack(results: Sequence[Any]) -> Any:
    """T equal pytrees as one of tensors [T, ...]."""
    return pytree.tree_map(lambda *rows: torch.stack(rows) if isinstance(rows[0], Tensor) else rows[0], *results)


def _exact(first_order: bool) -> AbstractContextManager[Any]:
    """Within it, every operation is differentiable at will, where that is asked for: kernels are faster."""
    return nullcontext() if first_order or not torch.is_grad_enabled() else formulas()


def general_inner_loop(
    rule: TaskRule,
    plan: GeneralPlan,
    theta: Mapping[str, Tensor],
    rates: Sequence[Tensor],
    data: Mapping[str, Any],
    weights: Sequence[Any] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
) -> GeneralResult:
    """Adapt to every task of a batch and judge the result.

    Args:
        rule: model, losses, number of steps, update rule.
        plan: vmap or loop, and the batch normalisation mode.
        theta: the adapted tensors by name, [*shape], shared by all tasks at the start.
        rates: as `_general_rates.op_rates` gives them, in the order of `rule.adapted`.
        data: "sx", and where given "sy", "qx", "qy", "support_mask", "query_mask": pytrees of [T, ...].
        weights: of the query loss at theta_0 .. theta_K, numbers or a tensor [K+1]; None for theta_K alone.
        fixed: tensors to use in place of the model's own, by name (copies, when a run must leave no trace).

    Differentiable any number of times to everything it is given and to the model's own tensors.
    """
    given, names = dict(fixed or {}), plan.stateful
    rule = replace(rule, first_order=True) if plan.blocked else rule  # for its values, which are the same
    forward = Private(rule.model, plan.batch_norm, plan.recomputes)
    if plan.once and torch.is_grad_enabled():
        own = {name: p for name, p in rule.model.named_parameters() if name not in theta}
        theta, given = ({n: once_only(t, plan.once) for n, t in held.items()} for held in (theta, own | given))

    def one(task: Mapping[str, Any], functional: bool) -> dict[str, Any]:
        # copies per task: what one task's forwards leave behind must not reach another task
        own = fresh_buffers(rule.model, names) if names else {}
        return run_task(rule, dict(theta), {**given, **own}, rates, weights, task, functional, forward)

    with _exact(rule.first_order):
        if plan.mode == "vmap":
            result = vmap(lambda task: one(task, True), randomness="different")(dict(data))
            # what no task changed comes out as one tensor repeated with stride 0: the caller's own
            result["adapted"] = {n: v if v.stride(0) else v.clone() for n, v in result["adapted"].items()}
        else:
            functional = _in_transform() or torch.is_inference_mode_enabled()  # where autograd records nothing
            result = _stack([one(task, functional) for task in _unbind(dict(data))])
    forward.release()
    adapted, moments = result["adapted"], result["moments"]
    if rule.keep == KEEP_STEPS:
        adapted = {name: value.transpose(0, 1) for name, value in adapted.items()}
    # without grad the loop differentiates by leaves of its own, which must not be seen outside; tangents must
    if not torch.is_grad_enabled() and not is_forward_mode():
        result, adapted, moments = pytree.tree_map_only(Tensor, Tensor.detach, (result, adapted, moments))
    elif plan.blocked:
        result, adapted = pytree.tree_map_only(Tensor, lambda t: blocked(t, plan.blocked), (result, adapted))
    loss, output = result.get("loss"), result.get("output")
    if rule.query_steps:
        loss, output = pytree.tree_map_only(Tensor, lambda t: t.transpose(0, 1), (loss, output))
    return GeneralResult(loss, output, result["support_losses"].transpose(0, 1), adapted, moments or None)


def forward_tasks(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Any,
    plan: GeneralPlan,
    fixed: Mapping[str, Tensor] | None = None,
) -> Any:
    """Each task's own model on its own inputs: params [T, *shape] by name, x [T, N, ...] -> [T, N, ...].

    `fixed` are tensors to use in place of the model's own in all tasks.
    """
    same, forward = dict(fixed or {}), Private(model, plan.batch_norm, plan.recomputes)
    with _exact(plan.first_order):
        if plan.mode == "vmap":
            return vmap(lambda p, rows: forward({**same, **p}, rows), randomness="different")(dict(params), x)
        rows = []
        for own, inputs in zip(_unbind(dict(params)), _unbind(x), strict=True):
            copies = fresh_buffers(model, plan.stateful) if plan.stateful else {}  # as in the inner loop
            rows.append(forward({**same, **copies, **own}, inputs))
        return _stack(rows)
