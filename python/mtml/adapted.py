"""Models adapted to a batch of tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils import _pytree as pytree

from mtml.notices import warn_of_statistics
from mtml.paths.judge import check_targets, task_losses
from mtml_kernels.batch_norm import step_rows
from mtml_kernels.checks import check_devices, check_leading, leaves
from mtml_kernels.general import GeneralPlan, forward_tasks
from mtml_kernels.losses import LossSpec, Opaque, resolve
from mtml_kernels.losses.task import TaskLoss

__all__ = ["Adapted"]


class Adapted:
    """What `MAML.adapt_tasks` returns: T models that differ in their adapted tensors and share the rest.

    Everything is differentiable back to the meta-parameters, the learning rates and the support inputs.

    Attributes:
        params: {name: [T, *shape]}, the adapted tensors after the last step.
        support_losses: [K, T], the support loss before each step.
        state: of the update rule, for another loop that goes on from here: {"step": steps taken, moment: {name: [T,
            *shape]}}; None for gradient descent. `MAML.adapt_tasks(..., start=adapted)` takes it.

    Example:
        >>> import torch, mtml
        >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1, steps=3, loss="mse")
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> adapted = maml.adapt_tasks(x, y, keep_steps=True)
        >>> adapted.params["weight"].shape, adapted(x).shape
        (torch.Size([4, 1, 2]), torch.Size([4, 8, 1]))
        >>> bool((adapted.loss(x, y) < adapted.loss(x, y, step=0)).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        support_losses: Tensor,
        loss: str | Callable[..., Tensor],
        keep_steps: bool,
        plan: GeneralPlan,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.state = state
        self.model, self.support_losses = model, support_losses
        self.keep_steps, self._tensors = keep_steps, dict(tensors)  # [K+1, T, *shape] where all steps are kept
        self.params = {name: t[-1] for name, t in tensors.items()} if keep_steps else dict(tensors)
        self._loss, self._plan = loss, plan

    @property
    def tasks(self) -> int:
        """T."""
        return self.support_losses.shape[1]

    @property
    def steps(self) -> int:
        """K."""
        return self.support_losses.shape[0]

    def params_at(self, step: int) -> dict[str, Tensor]:
        """The adapted tensors {name: [T, *shape]} after `step` steps; 0 is before adaptation, -1 after the last.

        Raises:
            ValueError: the steps in between were not kept.
            IndexError: there are not so many steps.
        """
        last = self.steps
        if not -(last + 1) <= step <= last:
            raise IndexError(f"step: expected {-last - 1} .. {last} for {last} steps, got {step}")
        step = step % (last + 1)
        if step == last:
            return self.params
        if not self.keep_steps:
            raise ValueError(
                f"step: only the parameters after the last step were kept, got {step}; pass keep_steps=True"
            )
        return {name: t[step] for name, t in self._tensors.items()}

    def __call__(self, x: Any, step: int = -1) -> Any:
        """Each task's model on its own inputs: x [T, N, ...] (or a tuple or dict of such) -> [T, N, ...].

        Raises ValueError where x holds another number of tasks; else as `params_at`.
        """
        self._check_tasks("x", x)
        if not is_dynamo_compiling():  # a graph's guards would hold on to every model that was ever warned of
            warn_of_statistics(self.model, self._plan.batch_norm)
        params, rows = self.params_at(step), self._rows(step)
        if self._plan.mode == "loop":
            return forward_tasks(self.model, params, x, self._plan, rows)
        try:
            return forward_tasks(self.model, params, x, self._plan, rows)
        except RuntimeError:  # what vmap has no rule for runs task by task, where errors of the model itself are raised
            return forward_tasks(self.model, params, x, replace(self._plan, mode="loop"), rows)

    def _rows(self, step: int) -> dict[str, Tensor]:
        """What a query pass after so many steps reads of the parameters that exist once per step."""
        return step_rows(self.model, step % (self.steps + 1), query=True)

    def loss(self, qx: Any, qy: Any = None, *, query_mask: Tensor | None = None, step: int = -1) -> Tensor:
        """The query loss of every task [T].

        Args:
            qx, qy: [T, Q, ...], or one TaskBatch; qy is None where the loss takes the output alone.
            query_mask: weights of the samples [T, Q].

        Raises:
            ValueError, TypeError: the targets do not fit the outputs or the loss.
        """
        if qy is None and hasattr(qx, "qx"):
            qx, qy, query_mask = qx.qx, qx.qy, qx.query_mask if query_mask is None else query_mask
        resolved = resolve(self._loss)
        loss = TaskLoss(resolved)
        if qy is None and not loss.alone:
            raise TypeError("qy: expected targets for this loss, got None; a loss of the output alone goes without")
        self._check_tasks("qx", qx)
        output = self(qx, step)
        if qy is not None:
            self._check_targets(resolved, qx, output, qy)
        return task_losses(loss, output, qy, query_mask, self.tasks)

    def _check_targets(self, loss: LossSpec | Opaque, qx: Any, output: Any, qy: Any) -> None:
        check_targets("qy", loss, output, qy)
        _, first = next(leaves("qx", qx))
        for label, tensor in leaves("qy", qy):
            check_leading(label, tensor, tuple(first.shape[:2]), "[T, Q]")
        check_devices(self.support_losses.device, leaves("qy", qy))

    def task(self, t: int, step: int = -1) -> nn.Module:
        """Task t's model as a module of its own: a deep copy holding the adapted values, cut off from the graph.

        Raises IndexError for a task that there is not.
        """
        if not -self.tasks <= t < self.tasks:
            raise IndexError(f"t: expected a task below {self.tasks}, got {t}")
        module = copy.deepcopy(self.model)
        own = dict(module.named_buffers()) | dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.params_at(step).items():
                own[name].copy_(value[t])
            for name, row in self._rows(step).items():
                own[name].copy_(row)
        return module

    def detach(self) -> Adapted:
        """The same values without their history."""
        tensors = {name: t.detach() for name, t in self._tensors.items()}
        state = None if self.state is None else pytree.tree_map_only(Tensor, Tensor.detach, dict(self.state))
        losses = self.support_losses.detach()
        return type(self)(self.model, tensors, losses, self._loss, self.keep_steps, self._plan, state)

    def some(self, tasks: slice) -> Adapted:
        """The same of some of the tasks."""
        tensors = {name: t[:, tasks] if self.keep_steps else t[tasks] for name, t in self._tensors.items()}
        state = None if self.state is None else pytree.tree_map_only(Tensor, lambda t: t[tasks], dict(self.state))
        losses = self.support_losses[:, tasks]
        return type(self)(self.model, tensors, losses, self._loss, self.keep_steps, self._plan, state)

    def _check_tasks(self, name: str, value: Any) -> None:
        for label, tensor in leaves(name, value):
            if tensor.ndim < 2 or tensor.shape[0] != self.tasks:
                raise ValueError(f"{label}: expected [T, N, ...] with T = {self.tasks} tasks, got {list(tensor.shape)}")

    def __repr__(self) -> str:
        return f"Adapted(tasks={self.tasks}, steps={self.steps}, params={list(self.params)})"
