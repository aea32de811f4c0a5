"""MAML's inner loop and the outer loss, as the mathematics reads; Finn, Abbeel, Levine 2017 (arXiv:1703.03400).

For every task: theta_0 = theta; g_k = grad of L_s at theta_k; theta_{k+1} = theta_k - alpha_k * g_k for k < K.
or by another rule, `reference.update`.
Then L = L_q(theta_K), or sum_k w_k L_q(theta_k) with step weights w (Antoniou et al. 2019, arXiv:1810.09502).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from mtml_kernels.losses.task import task_loss
from mtml_kernels.program.execution import run_program
from mtml_kernels.reference.update import update
from mtml_kernels.schema.inner_loop import (
    DATA,
    FIXED,
    KEEP_LAST,
    KEEP_NONE,
    MOMENTS,
    PER_STEP,
    QUERY_STEPS,
    STARTS,
    InnerLoopArgs,
)
from mtml_kernels.schema.losses import LossSpec
from mtml_kernels.schema.program import output_size
from mtml_kernels.schema.update import HYPERS

__all__ = ["Results", "TaskResult", "inner_loop"]

MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)


class TaskResult(NamedTuple):
    """One task: outer loss (or None), output at theta_K (or None), the K support losses, theta_0 ... theta_K, and the
    update rule's moments after the last step.
    """

    loss: Tensor | None
    output: Tensor | None
    support_losses: list[Tensor]
    trajectory: list[list[Tensor]]
    moments: list[list[Tensor]]


class Results(NamedTuple):
    """All tasks: loss [T], output [T, Q, out], support_losses [K, T], what is kept [T, *] or [K+1, T, *]."""

    loss: Tensor
    output: Tensor
    support_losses: Tensor
    kept: list[Tensor]


def inner_loop(a: InnerLoopArgs, own: Sequence[bool] | None = None) -> Results:
    """Adapt T tasks by K steps of gradient descent on their support sets and evaluate them on their query sets.

    Args:
        a: the arguments by name, see `InnerLoopArgs` and, for what is no tensor, `InnerLoopSpec`.
        own: which parameters are given for each task, [T, *shape]; None: the adapted ones if the spec says so.

    Returns:
        loss [T] ([0] without query targets), output at theta_K [T, Q, out] ([T, 0, out] without a query set; with
        QUERY_STEPS both of every theta_k, [K + 1, ...]), support_losses [K, T], and what is kept: per adapted parameter
        [T, *shape] (KEEP_LAST) or [K + 1, T, *shape] (KEEP_STEPS), then with MOMENTS the rule's, plane by plane.
        Differentiable any number of times; detached under no_grad, where the loop adapts all the same.
    """
    differentiable, starts = torch.is_grad_enabled(), a.spec.has(STARTS)
    own = [starts and flag for flag in a.spec.adapted] if own is None else own
    # inference mode is stronger than no_grad: it must be left for the inner gradients to exist
    with torch.inference_mode(False), torch.enable_grad():
        a = _recordable_arguments(a)
        tasks = [_of_task(a, t, own, differentiable) for t in range(a.tasks)]
        results = _collect(tasks, a)
    return results if differentiable else _detached(results)


def _of_task(a: InnerLoopArgs, t: int, own: Sequence[bool], differentiable: bool) -> TaskResult:
    """One task's inner loop and query set."""
    spec = a.spec
    support_spec, query_spec = (
        LossSpec.decode(kind, reduction, p0)
        for (kind, reduction), p0 in zip((spec.support_loss, spec.query_loss), spec.loss_args, strict=True)
    )

    def support_loss_at(theta: Sequence[Tensor], k: int) -> Tensor:
        x, y, mask = [x[t] for x in a.support_x], a.support_y[t], _row(a.support_mask, t)
        if spec.has(PER_STEP):
            x, y, mask = [each[k] for each in x], y[k], _row(mask, k)
        return _loss(support_spec, run_program(spec.program, spec.consts, theta, x, k, False), y, mask)

    def query_at(theta: Sequence[Tensor], k: int) -> tuple[Tensor | None, Tensor | None]:
        if not a.query_x:
            return None, None
        output = run_program(spec.program, spec.consts, theta, [x[t] for x in a.query_x], k, True)
        if a.query_y is None:
            return output, None
        return output, _loss(query_spec, output, a.query_y[t], _row(a.query_mask, t))

    params = [param[t] if flag else param for param, flag in zip(a.params, own, strict=True)]
    trajectory, moments, losses = _descend(a, params, t, support_loss_at, differentiable)
    if spec.has(QUERY_STEPS):
        found = [query_at(theta, k) for k, theta in enumerate(trajectory)]
        outputs, query_losses = ([each for each in column if each is not None] for column in zip(*found, strict=True))
        return TaskResult(_stacked(query_losses), _stacked(outputs), losses, trajectory, moments)
    output, loss = query_at(trajectory[-1], spec.steps)
    if loss is not None and a.step_weights is not None:
        losses_q = [*(query_at(theta, k)[1] for k, theta in enumerate(trajectory[:-1])), loss]
        loss = sum((w * each for w, each in zip(a.step_weights, losses_q, strict=True)), torch.zeros_like(loss))
    return TaskResult(loss, output, losses, trajectory, moments)


def _row(tensor: Tensor | None, index: int) -> Tensor | None:
    return None if tensor is None else tensor[index]


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.stack([*tensors]) if tensors else None


def _recordable_arguments(a: InnerLoopArgs) -> InnerLoopArgs:
    named: dict[str, Any] = {name: _recordable(getattr(a, name)) for name in (*DATA, *FIXED)}
    for name in ("params", "lr", "support_x", "query_x", "hyper", "moments"):
        named[name] = [_recordable(t) for t in getattr(a, name)]
    return a._replace(**named)


def _recordable(tensor: MaybeTensor) -> MaybeTensor:
    """The same tensor, copied where it was made under inference mode (autograd refuses those)."""
    return cast(MaybeTensor, tensor.clone()) if tensor is not None and tensor.is_inference() else tensor


def _descend(
    a: InnerLoopArgs,
    params: Sequence[Tensor],
    t: int,
    loss_at: Callable[[Sequence[Tensor], int], Tensor],
    differentiable: bool,
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    """theta_0 ... theta_K, the update rule's last moments, and the K losses on the way. No step keeps its graph where
    nothing will be differentiated.
    """
    spec, rule, taken = a.spec, a.spec.rule, a.spec.update[2]
    theta = [_start(p) if flag else p for p, flag in zip(params, spec.adapted, strict=True)]
    moving = [p for p, flag in zip(theta, spec.adapted, strict=True) if flag]
    numbers = dict(zip(HYPERS, a.hyper[0], strict=True)) if a.hyper else {}
    given = iter(a.moments)
    moments = [[next(given)[t] if a.moments else torch.zeros_like(p) for p in moving] for _ in rule.moments]
    trajectory, losses = [theta], []
    for k in range(spec.steps):
        loss = loss_at(theta, k)
        grads = _gradients(loss, moving, differentiable and not spec.first_order, differentiable)
        rates = [_rate(a.lr, i, k) for i in range(len(moving))]
        moving, moments = update(rule, numbers, moving, grads, rates, moments, taken + k)
        if not differentiable:
            loss, moving = loss.detach(), [p.detach().requires_grad_() for p in moving]
            moments = [[m.detach() for m in plane] for plane in moments]
        fresh = iter(moving)
        theta = [next(fresh) if flag else p for p, flag in zip(theta, spec.adapted, strict=True)]
        trajectory.append(theta)
        losses.append(loss)
    return trajectory, moments, losses


def _start(param: Tensor) -> Tensor:
    """theta_0: connected to the parameter where that requires a gradient, a leaf of its own otherwise."""
    return param.clone() if param.requires_grad else param.detach().clone().requires_grad_()


def _gradients(loss: Tensor, moving: Sequence[Tensor], create_graph: bool, retain_graph: bool) -> list[Tensor]:
    """g_k, zero for what the loss does not depend on; a constant without create_graph. The loss is a result as well, so
    its graph is retained where it may be differentiated itself.
    """
    if not moving or not loss.requires_grad:
        return [torch.zeros_like(p) for p in moving]
    grads = torch.autograd.grad(loss, moving, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(moving, grads, strict=True)]


def _rate(lr: Sequence[Tensor], param: int, step: int) -> Tensor:
    """alpha_k of the param-th adapted tensor: a scalar or one rate per element."""
    rates = lr[0] if len(lr) == 1 else lr[param]
    return rates[step] if rates.shape[0] > 1 else rates[0]


def _loss(spec: LossSpec, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The task loss of a flat output [N, out]."""
    if target.is_floating_point():
        target = target.reshape(output.shape)
    return task_loss(spec, output, target, mask)


def _collect(tasks: Sequence[TaskResult], a: InnerLoopArgs) -> Results:
    """Stack the tasks. Everything is a fresh tensor: no result aliases an argument."""
    spec, like, count = a.spec, a.params[0] if a.params else torch.empty(0), len(tasks)
    axis = 1 if spec.has(QUERY_STEPS) else 0
    losses = [task.loss for task in tasks if task.loss is not None]
    outputs = [task.output for task in tasks if task.output is not None]
    support = [task.support_losses[k] for k in range(spec.steps) for task in tasks] or [like.new_zeros(0)]
    kept = [_kept(tasks, i, a) for i, flag in enumerate(spec.adapted) if flag] if spec.keep != KEEP_NONE else []
    if spec.has(MOMENTS):
        shapes = [a.task_shape(i) for i, flag in enumerate(spec.adapted) if flag]
        planes = [(plane, i, shape) for plane in range(len(spec.rule.moments)) for i, shape in enumerate(shapes)]
        for plane, i, shape in planes:
            found = [task.moments[plane][i] for task in tasks]
            kept.append(torch.stack(found) if found else like.new_zeros(0, *shape))
    return Results(
        loss=torch.stack(losses, axis) if losses else like.new_zeros(0),
        output=torch.stack(outputs, axis) if outputs else like.new_zeros(count, 0, output_size(spec.program)),
        support_losses=torch.stack(support).reshape(spec.steps, count),
        kept=kept,
    )


def _kept(tasks: Sequence[TaskResult], index: int, a: InnerLoopArgs) -> Tensor:
    steps, like = a.spec.steps, a.params[index]
    if not tasks:
        lead = (0,) if a.spec.keep == KEEP_LAST else (steps + 1, 0)
        return like.new_zeros(*lead, *a.task_shape(index))
    if a.spec.keep == KEEP_LAST:
        return torch.stack([task.trajectory[-1][index] for task in tasks])
    return torch.stack([torch.stack([task.trajectory[k][index] for task in tasks]) for k in range(steps + 1)])


def _detached(results: Results) -> Results:
    loss, output, support_losses, kept = results
    return Results(loss.detach(), output.detach(), support_losses.detach(), [p.detach() for p in kept])
