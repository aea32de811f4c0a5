"""`task_update`, the documented function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.checks import check_finite, check_steps, shown
from mtml_kernels.ops.task_update import BACKENDS, task_update_call
from mtml_kernels.precision import cast, computed_in, float32_call
from mtml_kernels.schema.task_update import UpdateArgs, UpdateForm
from mtml_kernels.schema.update import HYPERS, NAMED, UpdateRule, UpdateSpec

__all__ = ["task_update"]

_computed = computed_in(BACKENDS)


def task_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Any,
    *,
    state: Sequence[Tensor] | None = None,
    step: int | None = None,
    rule: str | UpdateRule = "sgd",
    backend: str = "auto",
) -> list[Tensor]:
    """One step of an update rule for every tensor of every task, as one operation; by the formulas of torch.optim.

    Differentiable any number of times to parameters, gradients, rates, state and the rule's numbers. A clipping rule
    scales each task's gradient by the norm over all tensors of that task.

    Args:
        params: P tensors [T, *shape], with shapes of their own.
        grads: one like each.
        lr: a number or a scalar tensor for all; or a list of P: a number, a scalar tensor, or a tensor [*shape] (a rate
            an element), [T, 1, ...] (a rate a task) or [T, *shape].
        state: what the step before returned behind the parameters, None before the first step.
        step: how many steps have been taken; needed with `state`, 0 without.
        rule: "sgd", "adam", "adamw" or "rmsprop" with the numbers of torch.optim, or a rule of `mtml.inner`, such as
            `mtml.inner.SGD(momentum=0.9)` or `mtml.inner.Adam(clip_norm=1.0)`.
        backend: "auto", "cpu" (float32 and float64), "triton" (CUDA tensors), "torch" (any device) or "reference".

    float16 and bfloat16 are computed in float32 where the backend does not take them, and come back as they were; under
    autocast dtypes may differ.

    Returns:
        The P parameters after the step, then the state: P tensors for each of the rule's moments, in the order of
        `rule.spec.moments` ("exp_avg", "exp_avg_sq" for Adam; none for plain SGD). So with P parameters, `found[:P]`
        are the parameters and `found[P:]` the next step's `state`.

    Raises:
        ValueError: shapes, lengths or devices disagree, `state` without `step` or the reverse, a rate that is not
            finite, or an unknown rule or backend.
        TypeError: an argument of another type, or dtypes disagree.
        BackendUnavailable: `backend` names one that cannot run here.

    Example:
        >>> import torch
        >>> from mtml_kernels import task_update
        >>> params = [torch.randn(4, 5, 3), torch.randn(4, 5)]
        >>> grads = [torch.randn_like(p) for p in params]
        >>> after = task_update(params, grads, 0.1, rule="adam")
        >>> after = task_update(after[:2], grads, 0.1, rule="adam", state=after[2:], step=1)
        >>> [list(t.shape) for t in after]
        [[4, 5, 3], [4, 5], [4, 5, 3], [4, 5], [4, 5, 3], [4, 5]]

    Paper: Sutskever et al. 2013 (momentum); Kingma, Ba 2015 (arXiv:1412.6980); Loshchilov, Hutter 2019
    (arXiv:1711.05101).
    """
    theta, given = _tensors("params", params), _tensors("grads", grads)
    if theta and float32_call(_computed, backend, theta[0], theta, given, state):
        copies: Any = cast((theta, given, lr, state), torch.float32)
        found = task_update(*copies[:3], state=copies[3], step=step, rule=rule, backend=backend)
        return [t.to(theta[i % len(theta)].dtype) for i, t in enumerate(found)]
    if not theta or theta[0].ndim == 0:
        raise ValueError(f"params: expected at least one tensor [T, *shape], got {shown(theta[0] if theta else [])}")
    spec, numbers = _rule(rule)
    taken = _step(spec, state, step)
    moments = [] if state is None else _tensors("state", state)
    if state is not None and len(moments) != len(theta) * len(spec.moments):
        raise ValueError(
            f"state: expected {len(theta) * len(spec.moments)} tensors, one like each parameter for each of "
            f"{', '.join(spec.moments) or 'no moments'}, got {len(moments)}; pass what the step before returned behind "
            "the parameters"
        )
    hyper = _hyper(numbers, theta[0].device)
    args = UpdateArgs(theta, given, _rates(lr, theta), moments, hyper)
    return task_update_call(args, UpdateForm(spec, taken), backend)


def _tensors(name: str, values: Any) -> list[Tensor]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: expected a list of tensors, got {shown(values)}; pass [tensor] for one")
    for i, t in enumerate(values):
        if not isinstance(t, Tensor):
            way_out = "; of a parameter that has no gradient pass zeros, or leave it out" if t is None else ""
            raise TypeError(f"{name}[{i}]: expected a tensor, got {shown(t)}{way_out}")
    return list(values)


def _rule(rule: Any) -> tuple[UpdateSpec, Mapping[str, Any]]:
    if isinstance(rule, str) and rule in NAMED:
        return NAMED[rule]
    spec = getattr(rule, "spec", None)
    if isinstance(spec, UpdateSpec):
        return spec, rule.numbers()
    names = ", ".join(map(repr, NAMED))
    raise ValueError(
        f"rule: expected one of {names} or a rule of mtml.inner such as mtml.inner.Adam(), got {shown(rule)}"
    )


def _step(spec: UpdateSpec, state: Any, step: Any) -> int:
    """How many steps have been taken: a state that is not the first step's counts only with its number."""
    if step is None and (state is None or not spec.moments):
        return 0
    if step is None:
        raise ValueError(
            "step: expected the number of steps that made the state, got None; a first step would forget it: pass "
            "step=1 with what the first step returned, 2 with the second's"
        )
    taken = check_steps(step, "step")
    if spec.moments and (state is None) != (taken == 0):
        raise ValueError(
            f"state: expected {'none for step=0' if taken == 0 else f'that of the step before with step={taken}'}, got "
            f"{'none' if state is None else 'one'}; pass state and step together from the second step on"
        )
    return taken


def _hyper(numbers: Mapping[str, Any], device: torch.device) -> Tensor:
    """The rule's numbers [8] in double precision, differentiable to those that are tensors."""
    values = [numbers.get(name, 0.0) for name in HYPERS]
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])


def _rates(lr: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """A rate [1 or T, *shape or ones] for each parameter."""
    if not isinstance(lr, list | tuple):
        if isinstance(lr, Tensor) and lr.ndim:
            raise ValueError(
                f"lr: expected a number, a scalar tensor or a list of one rate a parameter, got {shown(lr)}"
            )
        _check_finite("lr", lr)
        like = params[0]
        one = torch.as_tensor(lr, dtype=like.dtype, device=like.device)
        return [one.reshape((1,) * p.ndim) for p in params]
    if len(lr) != len(params):
        raise ValueError(f"lr: expected {len(params)} rates, one a parameter, got {len(lr)}; pass a number for all")
    return [_rate(f"lr[{i}]", rate, p) for i, (rate, p) in enumerate(zip(lr, params, strict=True))]


def _check_finite(name: str, rate: Any) -> None:
    """Of what can be read without waiting for a device or breaking a graph."""
    if isinstance(rate, Tensor):
        traced = is_compiling() or torch._C._len_torch_dispatch_stack()
        if traced or rate.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(rate):
            return
    check_finite(name, rate)


def _rate(name: str, rate: Any, param: Tensor) -> Tensor:
    _check_finite(name, rate)
    tensor = torch.as_tensor(rate, dtype=param.dtype, device=param.device)
    shape, ones = param.shape, (1,) * (param.ndim - 1)
    if tensor.ndim == 0:
        return tensor.reshape(1, *ones)
    if tensor.shape == shape[1:]:
        return tensor.unsqueeze(0)
    if tensor.ndim == param.ndim and tensor.shape[0] in (1, shape[0]) and tensor.shape[1:] in (shape[1:], ones):
        return tensor
    raise ValueError(
        f"{name}: expected a scalar, a rate an element {list(shape[1:])}, or one a task {[shape[0], *ones]} or "
        f"{list(shape)}; got {shown(rate)}"
    )
