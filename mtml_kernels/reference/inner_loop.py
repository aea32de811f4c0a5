"""MAML's inner loop and the outer loss, as the mathematics reads; Finn, Abbeel, Levine 2017 (arXiv:1703.03400).

For every task: theta_0 = theta; g_k = grad of L_s at theta_k; theta_{k+1} = theta_k - alpha_k * g_k for k < K.
Then L = L_q(theta_K), or sum_k w_k L_q(theta_k) with step weights w (Antoniou et al. 2019, arXiv:1810.09502).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from mtml_kernels.losses.task import task_loss
from mtml_kernels.program.encoding import decode
from mtml_kernels.program.execution import run_program
from mtml_kernels.schema.losses import LossSpec

__all__ = ["Results", "TaskResult", "inner_loop"]

MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)


class TaskResult(NamedTuple):
    """One task: outer loss (or None), output at theta_K (or None), the K support losses, theta_0 ... theta_K."""

    loss: Tensor | None
    output: Tensor | None
    support_losses: list[Tensor]
    trajectory: list[list[Tensor]]


class Results(NamedTuple):
    """All tasks: loss [T], output [T, Q, out], support_losses [K, T], adapted parameters [T, *] or [K+1, T, *]."""

    loss: Tensor
    output: Tensor
    support_losses: Tensor
    adapted: list[Tensor]


def inner_loop(
    params: Sequence[Tensor],
    adapted: Sequence[bool],
    support_x: Sequence[Tensor],
    support_y: Tensor,
    query_x: Sequence[Tensor],
    query_y: Tensor | None,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    lr: Sequence[Tensor],
    step_weights: Tensor | None,
    program: Sequence[int],
    consts: Sequence[float],
    steps: int,
    support_loss: Sequence[int],
    query_loss: Sequence[int],
    loss_args: Sequence[float],
    first_order: bool,
    keep: int,
) -> Results:
    """Adapt T tasks by K steps of gradient descent on their support sets and evaluate them on their query sets.

    Args:
        params: one tensor per program parameter, shared by all tasks; adapted: which of them the inner loop changes.
        support_x, query_x: one tensor [T, S, *] ([T, Q, *]) per program input, integer ids where embeddings read it;
            query_x may be empty.
        support_y, query_y: targets [T, S, *] ([T, Q, *]), class ids [T, S] for cross_entropy; query_y may be None.
        support_mask, query_mask: sample weights [T, S] ([T, Q]) or None.
        lr: one tensor for all ([1] or [K]), or one per adapted parameter: [1], [K], [1, *shape] or [K, *shape].
        step_weights: [K + 1] weights of L_q(theta_0 ... theta_K), or None for the last alone.
        program, consts: the encoding of the layer program.
        steps: K. support_loss, query_loss: (kind, reduction) codes; loss_args: their p0 (see `LossSpec.encode`).
        first_order: treat every g_k as a constant.
        keep: 0 nothing, 1 theta_K, 2 theta_0 ... theta_K.

    Returns:
        loss [T] ([0] without query targets), output at theta_K [T, Q, out] ([T, 0, out] without a query set),
        support_losses [K, T], and per adapted parameter [T, *shape] (keep 1) or [K + 1, T, *shape] (keep 2).
        Differentiable any number of times; detached under no_grad, where the loop adapts all the same.
    """
    differentiable = torch.is_grad_enabled()
    support_spec = LossSpec.decode(support_loss[0], support_loss[1], loss_args[0])
    query_spec = LossSpec.decode(query_loss[0], query_loss[1], loss_args[1])

    def run(theta: Sequence[Tensor], x: Sequence[Tensor], step: int, query: bool) -> Tensor:
        return run_program(program, consts, theta, x, step, query)

    def of_task(t: int) -> TaskResult:
        def support_loss_at(theta: Sequence[Tensor], step: int) -> Tensor:
            output = run(theta, [x[t] for x in support_x], step, False)
            return _loss(support_spec, output, support_y[t], None if support_mask is None else support_mask[t])

        def query_at(theta: Sequence[Tensor], step: int) -> tuple[Tensor | None, Tensor | None]:
            if not query_x:
                return None, None
            output = run(theta, [x[t] for x in query_x], step, True)
            if query_y is None:
                return output, None
            return output, _loss(query_spec, output, query_y[t], None if query_mask is None else query_mask[t])

        trajectory, losses = _descend(params, adapted, support_loss_at, lr, steps, first_order, differentiable)
        output, loss = query_at(trajectory[-1], steps)
        if loss is not None and step_weights is not None:
            losses_q = [*(query_at(theta, k)[1] for k, theta in enumerate(trajectory[:-1])), loss]
            loss = sum((w * each for w, each in zip(step_weights, losses_q, strict=True)), torch.zeros_like(loss))
        return TaskResult(loss, output, losses, trajectory)

    # inference mode is stronger than no_grad: it must be left for the inner gradients to exist
    with torch.inference_mode(False), torch.enable_grad():
        params, support_x, query_x, lr = ([_recordable(t) for t in ts] for ts in (params, support_x, query_x, lr))
        support_y, query_y, step_weights = _recordable(support_y), _recordable(query_y), _recordable(step_weights)
        support_mask, query_mask = _recordable(support_mask), _recordable(query_mask)
        tasks = [of_task(t) for t in range(support_y.shape[0])]
        results = _collect(tasks, params, adapted, steps, keep, decode(tuple(program)).output_size)
    return results if differentiable else _detached(results)


def _recordable(tensor: MaybeTensor) -> MaybeTensor:
    """The same tensor, copied where it was made under inference mode (autograd refuses those)."""
    return cast(MaybeTensor, tensor.clone()) if tensor is not None and tensor.is_inference() else tensor


def _descend(
    params: Sequence[Tensor],
    adapted: Sequence[bool],
    loss_at: Callable[[Sequence[Tensor], int], Tensor],
    lr: Sequence[Tensor],
    steps: int,
    first_order: bool,
    differentiable: bool,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """theta_0 ... theta_K and the K losses on the way. No step keeps its graph where nothing will be differentiated."""
    theta = [_start(p) if flag else p for p, flag in zip(params, adapted, strict=True)]
    trajectory, losses = [theta], []
    for k in range(steps):
        loss = loss_at(theta, k)
        moving = [p for p, flag in zip(theta, adapted, strict=True) if flag]
        grads = _gradients(loss, moving, differentiable and not first_order, differentiable)
        moved = [p - _rate(lr, i, k) * g for i, (p, g) in enumerate(zip(moving, grads, strict=True))]
        if not differentiable:
            loss, moved = loss.detach(), [p.detach().requires_grad_() for p in moved]
        fresh = iter(moved)
        theta = [next(fresh) if flag else p for p, flag in zip(theta, adapted, strict=True)]
        trajectory.append(theta)
        losses.append(loss)
    return trajectory, losses


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
    if not spec.info.classes:
        target = target.reshape(output.shape)
    return task_loss(spec, output, target, mask)


def _collect(
    tasks: Sequence[TaskResult], params: Sequence[Tensor], adapted: Sequence[bool], steps: int, keep: int, size: int
) -> Results:
    """Stack the tasks. Everything is a fresh tensor: no result aliases an argument."""
    like, count = params[0] if params else torch.empty(0), len(tasks)
    losses = [task.loss for task in tasks if task.loss is not None]
    outputs = [task.output for task in tasks if task.output is not None]
    support = [task.support_losses[k] for k in range(steps) for task in tasks]
    return Results(
        loss=torch.stack(losses) if losses else like.new_zeros(0),
        output=torch.stack(outputs) if outputs else like.new_zeros(count, 0, size),
        support_losses=torch.stack(support).reshape(steps, count) if support else like.new_zeros(steps, count),
        adapted=[_kept(tasks, i, p, steps, keep) for i, p in enumerate(params) if adapted[i]] if keep else [],
    )


def _kept(tasks: Sequence[TaskResult], index: int, param: Tensor, steps: int, keep: int) -> Tensor:
    if not tasks:
        return param.new_zeros(0, *param.shape) if keep == 1 else param.new_zeros(steps + 1, 0, *param.shape)
    if keep == 1:
        return torch.stack([task.trajectory[-1][index] for task in tasks])
    return torch.stack([torch.stack([task.trajectory[k][index] for task in tasks]) for k in range(steps + 1)])


def _detached(results: Results) -> Results:
    loss, output, support_losses, adapted = results
    return Results(loss.detach(), output.detach(), support_losses.detach(), [p.detach() for p in adapted])
