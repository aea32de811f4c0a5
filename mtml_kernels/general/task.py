"""One task of the general path: K gradient steps and the query losses, in operations that autograd and vmap follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from mtml_kernels.batch_norm import step_rows
from mtml_kernels.losses.task import TaskLoss
from mtml_kernels.rates import rate_at
from mtml_kernels.schema.inner_loop import KEEP_LAST, KEEP_NONE, KEEP_STEPS
from mtml_kernels.schema.update import UpdateSpec

__all__ = ["TaskRule", "apply_update", "run_task"]


Params = dict[str, Tensor]
Update = Callable[..., Any]


@dataclass(frozen=True)
class TaskRule:
    """What happens in every task; nothing in it depends on the data.

    `update(params, grads, lr, step)` returns the next parameters, all dicts by name; one that has a fifth parameter
    `state` gets what it returned before (None at first) and returns (parameters, state).
    """

    model: nn.Module
    adapted: tuple[str, ...]
    loss: TaskLoss
    query_loss: TaskLoss
    steps: int
    first_order: bool = False
    update: Update | None = None
    keep: int = KEEP_NONE
    per_step: bool = False  # the support sets have a step axis
    query_steps: bool = False  # loss and output are those at theta_0 .. theta_K
    taken: int = 0  # steps that the rule has taken before


def apply_update(
    update: Update | None, theta: Params, grads: Params, rates: Params, step: int, state: Any = None
) -> tuple[Params, Any]:
    """(the parameters after one step, the rule's state); `update` as in `TaskRule`, None for gradient descent.

    Raises TypeError where the rule returns something else than what it is asked for.
    """
    if update is None:
        return {name: value - rates[name] * grads[name] for name, value in theta.items()}, None
    if "state" in inspect.signature(update).parameters:
        result, state = update(theta, grads, rates, step, state=state)
    else:
        result = update(theta, grads, rates, step)
    if not isinstance(result, Mapping) or set(result) != set(theta):
        raise TypeError("update: expected a dict with the names of the adapted tensors, like the one it was given")
    return {name: result[name] for name in theta}, state


def _autograd(
    loss_of: Callable[[Params], Tensor], theta: Params, create_graph: bool, keep: bool
) -> tuple[Params, Tensor]:
    """Gradients by torch.autograd: works with every module, custom autograd functions of any style included."""
    with torch.enable_grad():
        loss = loss_of(theta)
        if not loss.requires_grad:
            return {name: torch.zeros_like(value) for name, value in theta.items()}, loss
        grads = torch.autograd.grad(
            loss, list(theta.values()), create_graph=create_graph, retain_graph=keep, materialize_grads=True
        )
    return dict(zip(theta, grads, strict=True)), loss


def _functional(loss_of: Callable[[Params], Tensor], theta: Params) -> tuple[Params, Tensor]:
    """Gradients by torch.func: nests in vmap and in a caller's own torch.func transforms."""
    grads, loss = grad_and_value(loss_of)(theta)
    return grads, loss


class _Steps:
    """The gradient steps of one task."""

    def __init__(
        self,
        rule: TaskRule,
        fixed: Params,
        rates: Sequence[Tensor],
        functional: bool,
        forward: Callable[[Mapping[str, Tensor], Any], Any],
        state: Any = None,
    ) -> None:
        self.rule, self.fixed, self.rates, self.functional, self.forward = rule, fixed, rates, functional, forward
        self.recording = torch.is_grad_enabled()
        self.state: Any = state

    def start(self, theta: Params) -> Params:
        """Parameters that autograd can differentiate by, as they are where they already can be."""
        if self.functional:
            return theta
        if not self.recording:
            return {name: value.detach().requires_grad_() for name, value in theta.items()}
        return {name: v if v.requires_grad else v.detach().requires_grad_() for name, v in theta.items()}

    def first(self, theta: Params) -> Params:
        """theta_0, apart from all else: starts and inputs that were made of the model's parameters are no part of the
        inner gradient.
        """
        theta = self.start(theta)
        if self.functional or not self.recording:  # there they are apart already
            return theta
        return {name: value.view_as(value) for name, value in theta.items()}

    def step(self, k: int, theta: Params, data: Mapping[str, Any]) -> tuple[Params, Tensor]:
        """(theta_{k+1}, support loss at theta_k)."""
        grads, loss = self._gradients(k, theta, data)
        if self.rule.first_order:
            grads = {name: g.detach() for name, g in grads.items()}
        return self.start(self._next(k, theta, grads)), loss if self.recording or self.functional else loss.detach()

    def output(self, k: int, theta: Params, x: Any, query: bool) -> Any:
        """The model's at theta_k."""
        return self.forward({**self.fixed, **step_rows(self.rule.model, k, query, self.fixed), **theta}, x)

    def _gradients(self, k: int, theta: Params, data: Mapping[str, Any]) -> tuple[Params, Tensor]:
        def loss_of(params: Params) -> Tensor:
            x, y, mask = data["sx"], data.get("sy"), data.get("support_mask")
            if self.rule.per_step:
                x, y, mask = pytree.tree_map_only(Tensor, lambda t: t[k], (x, y, mask))
            loss = self.rule.loss(self.output(k, params, x, False), y, mask)
            if loss.ndim:
                raise ValueError(f"loss: expected a scalar per task, got {list(loss.shape)}")
            return loss

        if self.functional:
            return _functional(loss_of, theta)
        # first order still needs the loss's own graph: support_losses stay differentiable
        return _autograd(loss_of, theta, self.recording and not self.rule.first_order, self.recording)

    def _next(self, k: int, theta: Params, grads: Params) -> Params:
        rates = {name: rate_at(self.rates, i, k) for i, name in enumerate(self.rule.adapted)}
        result, self.state = apply_update(self.rule.update, theta, grads, rates, k, self.state)
        return result


def _stacked(history: list[Params], keep: int) -> Params:
    if keep == KEEP_NONE:
        return {}
    if keep == KEEP_LAST:
        return dict(history[-1])
    return {name: torch.stack([params[name] for params in history]) for name in history[0]}


def _moments(update: Update | None, state: Any) -> dict[str, Any]:
    """What a rule that has an `UpdateSpec` leaves for the next step, by name; of other rules nothing is known."""
    spec = getattr(update, "spec", None)
    return {name: state[name] for name in spec.moments} if isinstance(spec, UpdateSpec) and state is not None else {}


def run_task(
    rule: TaskRule,
    theta: Params,
    fixed: Params,
    rates: Sequence[Tensor],
    weights: Sequence[Any] | None,
    data: Mapping[str, Any],
    functional: bool,
    forward: Callable[[Mapping[str, Tensor], Any], Any],
) -> dict[str, Any]:
    """One task: {"support_losses": [K], "adapted": {...}, "moments": {...}} and, with a query set, "output" and "loss".

    Args:
        theta: the adapted tensors at the start, by name.
        fixed: further tensors to use in place of the model's own.
        weights: of the query loss at theta_0 .. theta_K; None for 1 at theta_K alone.
        data: "sx" and, where given, "sy", "qx", "qy", "support_mask", "query_mask"; "start", tensors in the place of
            theta's; "moments", the update rule's after `rule.taken` steps.
        functional: gradients by torch.func instead of torch.autograd.
        forward: runs the model with tensors in place of its own, by name: a `Private`.
    """
    moments = data.get("moments")
    state = None if moments is None else {"step": rule.taken, **moments}
    steps = _Steps(rule, fixed, rates, functional, forward, state)
    theta = steps.first({**theta, **data.get("start", {})})
    history, losses = [theta], []
    total: Any = None
    judged = "qy" in data or rule.query_loss.alone
    result: dict[str, Any] = {}
    outputs: list[Any] = []
    totals: list[Any] = []
    for k in range(rule.steps + 1):
        last = k == rule.steps
        weight = (1.0 if last else 0.0) if weights is None else weights[k]
        skip = isinstance(weight, float) and weight == 0.0 and not rule.query_steps
        if "qx" in data and (last or not skip):
            output = steps.output(k, theta, data["qx"], True)
            if last:
                result["output"] = output
            outputs = [*outputs, output] if rule.query_steps else []
            if judged and rule.query_steps:
                totals = [*totals, rule.query_loss(output, data.get("qy"), data.get("query_mask"))]
            elif judged and not (skip and total is not None):
                loss = rule.query_loss(output, data.get("qy"), data.get("query_mask"))
                loss = loss if weights is None else weight * loss
                total = loss if total is None else total + loss
        if not last:
            theta, loss = steps.step(k, theta, data)
            losses.append(loss)
            history = [*history, theta] if rule.keep == KEEP_STEPS else [theta]
    if rule.query_steps and outputs:
        result["output"] = pytree.tree_map(lambda *steps: torch.stack(steps), *outputs)
        total = torch.stack(totals) if totals else None
    if total is not None:
        result["loss"] = total
    result["support_losses"] = torch.stack(losses) if losses else next(iter(theta.values())).new_zeros(0)
    result["adapted"] = _stacked(history, rule.keep)
    result["moments"] = _moments(rule.update, steps.state) if rule.keep else {}
    return result
