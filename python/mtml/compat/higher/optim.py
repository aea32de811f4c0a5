"""Differentiable optimisers: of one of torch.optim, or of a type and its settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mtml.compat.higher.optimizer import DifferentiableOptimizer, Override
from mtml.compat.higher.patch import FunctionalModule
from mtml.compat.higher.rules import (
    DifferentiableAdadelta,
    DifferentiableAdagrad,
    DifferentiableAdam,
    DifferentiableAdamax,
    DifferentiableAdamW,
    DifferentiableASGD,
    DifferentiableRMSprop,
    DifferentiableRprop,
    DifferentiableSGD,
)
from mtml.compat.higher.settings import apply_trainable_opt_params, get_trainable_opt_params

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableOptimizer",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "Override",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "diff_optim_type",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]

_known: dict[type, type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def diff_optim_type(opt_type: type) -> type[DifferentiableOptimizer]:
    """The differentiable optimiser for a type of torch.optim, or for one that was registered.

    Raises:
        ValueError: there is none.
    """
    if opt_type not in _known:
        names = ", ".join(kind.__name__ for kind in _known)
        raise ValueError(
            f"optimizer: expected one of {names}, got {getattr(opt_type, '__name__', opt_type)!r}; register_optim "
            "takes a differentiable form of it"
        )
    return _known[opt_type]


def register_optim(optim_type: type, diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Make a differentiable form of another optimiser known.

    Example:
        >>> import torch
        >>> class Mine(torch.optim.SGD): ...
        >>> register_optim(Mine, DifferentiableSGD)
    """
    _known[optim_type] = diff_optim_type


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable form of an optimiser, with its settings and its state as they are now.

    Args and errors as of `DifferentiableOptimizer`; `reference_params` are `model.parameters()`.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = get_diff_optim(torch.optim.SGD([w], lr=0.5), [w])
        >>> opt.step((w * w).sum(), params=[w])
        [tensor([0., 0.], grad_fn=<SubBackward0>)]
    """
    return diff_optim_type(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: FunctionalModule | None = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A new differentiable optimiser of a type of torch.optim.

    Args:
        opt_kwargs: settings, as the type takes them.
        params: tensors of the shapes to optimise, in the order of `params` of `step`; or groups of such with settings
            of their own, as torch.optim takes them; None: the patched model's.
        fmodel, device, override, track_higher_grads: as of `DifferentiableOptimizer`.

    Raises:
        ValueError: a type of no known form; neither params nor a patched model with weights.

    Example:
        >>> import torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=[w])
        >>> opt.step((w * w).sum(), params=[w])
        [tensor([0., 0.], grad_fn=<SubBackward0>)]
    """
    kind = diff_optim_type(opt_type)
    present: list[Tensor] = [] if fmodel is None else list(fmodel.fast_params or [])
    if params is None and not present:
        raise ValueError("params: expected tensors or groups of them where there is no fmodel with weights")
    wanted: list[Any] = present if params is None else list(params)
    groups = wanted if wanted and isinstance(wanted[0], dict) else [{"params": wanted}]
    dummies: dict[int, Tensor] = {}

    def dummy(tensor: Tensor) -> Tensor:
        return dummies.setdefault(id(tensor), torch.zeros_like(tensor, requires_grad=True))

    alike = [{**group, "params": [dummy(t) for t in _listed(group["params"])]} for group in groups]
    opt = opt_type(alike, **(opt_kwargs or {}))
    # groups may name the patched model's weights in another order than its own
    order = [id(t) for t in present] if dummies.keys() <= {id(t) for t in present} else list(dummies)
    reference = [dummies.get(key, torch.empty(0)) for key in order]
    return kind(
        opt,
        reference,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _listed(params: Any) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)
