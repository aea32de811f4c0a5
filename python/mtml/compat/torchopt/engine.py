"""One line for the batched engine: the script's module and inner optimizer, all tasks in one call of `mtml.MAML`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mtml import inner as rules
from mtml.algorithms.base import Loss, StepOptions
from mtml.algorithms.maml import MAML
from mtml.compat.follow import follow
from mtml.compat.rate import scalar
from mtml.compat.torchopt import pytree
from mtml.compat.torchopt.base import Chain, GradientTransformation, Kernel, kernel_of
from mtml.compat.torchopt.optim.meta.base import MetaOptimizer
from mtml.compat.torchopt.transform.moments import ScaleByAdam, ScaleByRms
from mtml.compat.torchopt.transform.simple import Decay, Scale, ScaleBySchedule, Trace

__all__ = ["meta_loss"]


def meta_loss(
    model: nn.Module,
    inner: MetaOptimizer,
    sx: Any,
    sy: Any = None,
    qx: Any = None,
    qy: Any = None,
    *,
    steps: int = 1,
    loss: Loss = "cross_entropy",
    **options: Unpack[StepOptions],
) -> Tensor:
    """The query losses [T] of all tasks, as the loop over tasks computes them: step `steps` times, then look.

    Gradient descent with momentum, Adam, AdamW and RMSProp, with constant or scheduled rates, run as one fused
    operation where the model is fused; every other transformation on the general path, exact as well. The engine is
    kept on the optimizer. Running statistics stay as they are, as a loop with ``detach_buffers=True`` leaves them.

    Args:
        model: the module that `inner` steps, or one that contains it.
        inner: the optimizer, as it is before a task's first step.
        sx, sy, qx, qy: support and query sets [T, S, ...], [T, Q, ...]; a TaskBatch may take their place.
        steps: inner steps.
        loss: of a task, as `mtml.MAML` takes it.
        options: of `mtml.MAML.meta_loss`: support_mask, query_mask, step_weights, ...

    Raises:
        TypeError: no MetaOptimizer.
        ValueError: the optimizer has taken steps, steps several modules, or none of the model's parameters.

    Example:
        >>> import torch
        >>> from mtml.compat import torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = torchopt.MetaAdam(net, lr=0.1)
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> torchopt.meta_loss(net, inner, x, y, x, y, steps=3, loss="mse").mean().backward()
    """
    if not isinstance(inner, MetaOptimizer):
        raise TypeError(f"inner: expected a MetaOptimizer, such as torchopt.MetaSGD(net, lr=0.1), got {inner!r}")
    leaves = pytree.tree_leaves(inner.state_dict())
    if any(isinstance(leaf, Tensor) and leaf.any() for leaf in leaves):
        raise ValueError("inner: expected an optimizer that has taken no step; recover_state_dict what it was before")
    return _engine(model, inner, steps, loss).meta_loss(sx, sy, qx, qy, steps=steps, **options)


def _engine(model: nn.Module, inner: MetaOptimizer, steps: int, loss: Loss) -> MAML:
    """The MAML of this optimizer: that of the call before where nothing has changed."""
    rule, lr = _followed(inner.impl, steps)
    # made anew at every call: by a schedule, or of a tensor [1]
    learnt = isinstance(lr, Tensor) and (lr._is_view() or (lr.requires_grad and not isinstance(lr, nn.Parameter)))
    key = (model, inner.impl, loss, _adapted(model, inner), None if learnt else lr)
    if inner._engine is None or not all(map(_same, inner._engine[0], key)):
        rates = torch.tensor(lr, dtype=torch.float64) if isinstance(lr, tuple) else lr
        options: dict[str, Any] = {"loss": loss, "params": key[3], "update": rule}
        inner._engine = key, MAML(model, rates, allow_unused=True, allow_nograd=True, **options)
    found: MAML = inner._engine[1]
    return follow(found, lr=lr) if learnt else found


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str | tuple | float | int) and type(a) is type(b) and bool(a == b))


def _adapted(model: nn.Module, inner: MetaOptimizer) -> tuple[str, ...] | None:
    """Names of the model's parameters that the optimizer steps; None for all that require grad."""
    if len(inner.param_containers_groups) != 1:
        raise ValueError(
            f"inner: expected an optimizer of one module, got one of {len(inner.param_containers_groups)}: step the "
            "tasks one by one, or make one optimizer of a module that holds them all"
        )
    stepped = {id(t) for held in inner.param_containers_groups[0] for t in held.values() if t is not None}
    every = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = tuple(name for name, p in every.items() if id(p) in stepped)
    if not names:
        raise ValueError(
            "inner: expected an optimizer of the model or of a part of it; it steps none of its parameters"
        )
    return None if len(names) == len(every) else names


def _followed(impl: GradientTransformation, steps: int) -> tuple[Any, Any]:
    """(the rule as MAML takes it, its rate): a rule of `mtml.inner` where there is one, else the transformation."""
    kernels = _kernels(impl)
    rule = _rule(kernels[:-1]) if kernels else None
    last = kernels[-1] if kernels else None
    if rule is not None and isinstance(last, Scale) and last.negative:
        return rule, scalar(last.size)
    if rule is not None and isinstance(last, ScaleBySchedule) and last.negative:
        return rule, _scheduled(last, steps)
    return _Transformed(impl), 1.0


def _kernels(impl: GradientTransformation) -> list[Kernel]:
    """What a transformation does, one thing after another; nothing where some of it is not known here."""
    kernel = kernel_of(impl)
    if not isinstance(kernel, Chain):
        return [] if kernel is None else [kernel]
    parts = [_kernels(member) for member in kernel.members]
    return [each for part in parts for each in part] if all(parts) else []


def _rule(kernels: Sequence[Kernel]) -> rules.Rule | None:
    """The rule of `mtml.inner` that does this before the rate is applied."""
    decay = 0.0
    if kernels and isinstance(kernels[0], Decay):
        if kernels[0].maximize:
            return None
        decay, kernels = kernels[0].weight_decay, kernels[1:]
    match kernels:
        case []:
            return rules.SGD(weight_decay=decay)
        case [Trace() as t]:
            return rules.SGD(t.momentum, t.dampening, t.nesterov, decay)
        case [ScaleByAdam() as a]:
            return rules.Adam((a.b1, a.b2), a.eps, a.eps_root, decay)
        case [ScaleByAdam() as a, Decay() as d] if not decay and not d.maximize:
            return rules.AdamW((a.b1, a.b2), a.eps, a.eps_root, d.weight_decay)
        case [ScaleByRms() as r] if not r.initial_scale:
            return rules.RMSprop(r.alpha, r.eps, 0.0, r.centered, decay)
        case [ScaleByRms() as r, Trace() as t] if not (r.initial_scale or t.dampening or t.nesterov):
            return rules.RMSprop(r.alpha, r.eps, t.momentum, r.centered, decay)
    return None


def _scheduled(schedule: ScaleBySchedule, steps: int) -> Any:
    """The rates of all steps: numbers, or [K] where they are computed from tensors that are learnt."""
    counts = torch.arange(max(steps, 1))
    values = [scalar(schedule.schedule(count)) for count in counts]
    learnt = next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)
    if learnt is not None:  # in float64, else the numbers among them would be rounded to float32
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=learnt.device) for value in values])
    return tuple(float(value) for value in values)


class _Transformed:
    """A transformation as an update rule of MAML."""

    def __init__(self, impl: GradientTransformation) -> None:
        self.impl = impl

    def __call__(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], lr: Any, step: int, state: Any = None
    ) -> tuple[dict[str, Tensor], Any]:
        own, given = tuple(params.values()), tuple(grads[name] for name in params)
        state = self.impl.init(own) if state is None else state
        updates, state = self.impl.update(given, state, params=own, inplace=False)
        return {name: p + u for (name, p), u in zip(params.items(), updates, strict=True)}, state
