"""The inner step of MAML for one task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.rate import number, rate, scalar
from mtml.compat.torchmeta.modules.module import MetaModule, Params
from mtml.gradients import recorded_gradients
from mtml_kernels.checks import shown

__all__ = ["check_model", "check_trainable", "gradient_update_parameters", "rates_by_name"]


def gradient_update_parameters(
    model: MetaModule,
    loss: Tensor,
    params: Params | None = None,
    step_size: float | Tensor | Mapping[str, Any] = 0.5,
    first_order: bool = False,
) -> OrderedDict[str, Tensor]:
    """The parameters after one step of gradient descent on a task's loss, differentiable back to those before it.

    Args:
        model: whose ``meta_named_parameters()`` are updated where `params` is None.
        loss: one number, computed with `params`.
        params: the parameters so far, for the second step and those after it.
        step_size: a number, a tensor that broadcasts with every parameter, or {name: number or tensor}, differentiable.
        first_order: take the gradients as constants.

    Raises:
        ValueError: the model is no MetaModule, or has none with parameters; the loss is not one number; `step_size`
            lacks a name.
        RuntimeError: a parameter requires no grad, or the loss does not depend on it.

    Example:
        >>> import torch
        >>> from mtml.compat.torchmeta.modules import MetaLinear
        >>> model = MetaLinear(2, 1)
        >>> params = gradient_update_parameters(model, model(torch.ones(4, 2)).square().mean(), step_size=0.1)
        >>> model(torch.ones(1, 2), params=params).sum().backward()
    """
    check_model(model)
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one number for the task, got {list(loss.shape)}; take its mean")
    params = check_trainable(dict(model.meta_named_parameters()) if params is None else params)
    names, tensors = list(params), list(params.values())
    grads = _gradients(loss, names, tensors, first_order)
    step_size = number(step_size)
    if isinstance(step_size, float | int):
        moved: Any = torch._foreach_add(tensors, grads, alpha=-step_size)
    else:
        rates = rates_by_name(step_size, names)
        moved = [tensor - rates[name] * grad for name, tensor, grad in zip(names, tensors, grads, strict=True)]
    return OrderedDict(zip(names, moved, strict=True))


def check_model(model: Any) -> MetaModule:
    """The model; ValueError where it is no MetaModule."""
    if not isinstance(model, MetaModule):
        inside = isinstance(getattr(model, "module", None), MetaModule)
        hint = "; call it with the module inside, and average gradients by mtml.distributed" if inside else ""
        raise ValueError(f"model: expected a torchmeta.modules.MetaModule, got {type(model).__name__}{hint}")
    return model


def rates_by_name(step_size: Any, names: list[str]) -> dict[str, Any]:
    """{name: step size}; ValueError for a dict that lacks one, TypeError for one that is neither number nor tensor."""
    if not hasattr(step_size, "items"):  # an nn.ParameterDict is no Mapping
        return dict.fromkeys(names, scalar(rate("step_size", step_size)))
    rates = {name: scalar(rate(f"step_size[{name!r}]", value)) for name, value in step_size.items()}
    if lacking := [name for name in names if name not in rates]:
        raise ValueError(f"step_size: expected a step size for each of {', '.join(names)}; {lacking[0]!r} has none")
    return rates


def check_trainable(params: Params) -> Params:
    """The parameters; ValueError where there is none, RuntimeError where one requires no grad."""
    if not params:
        raise ValueError(
            "params: expected at least one tensor to adapt, got none; is a layer of it a MetaModule, as MetaLinear?"
        )
    for name, tensor in params.items():
        if not tensor.requires_grad:
            raise RuntimeError(
                f"params: expected tensors that require grad, {name!r} does not; leave it out of params= (the model "
                "then uses its own), make its layer a plain nn.Module, or call requires_grad_() on it"
            )
    return params


def _gradients(loss: Tensor, names: list[str], tensors: list[Tensor], first_order: bool) -> list[Tensor]:
    if not loss.requires_grad:
        raise RuntimeError("loss: expected one that requires grad; compute it by the model, outside torch.no_grad()")
    grads: Sequence[Tensor | None]
    grads = torch.autograd.grad(loss, tensors, allow_unused=True) if first_order else recorded_gradients(loss, tensors)
    if unused := [name for name, grad in zip(names, grads, strict=True) if grad is None]:
        raise RuntimeError(
            f"loss: expected one that depends on every parameter, got one that does not on {', '.join(unused)}. Was it "
            f"computed with these params ({shown(names)})? What no inner step is to change goes into a plain nn.Module"
        )
    return [grad for grad in grads if grad is not None]
