"""Optimizers that write into parameters, as torch.optim's do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml.compat.torchopt import pytree
from mtml.compat.torchopt.base import GradientTransformation, UninitializedState, uninitialised

__all__ = ["Optimizer", "check_impl", "loaded"]


def check_impl(impl: Any) -> GradientTransformation:
    """The argument, or TypeError."""
    if not isinstance(impl, GradientTransformation):
        raise TypeError(
            f"impl: expected a GradientTransformation, such as torchopt.sgd(lr=0.1), got {impl!r} "
            f"({type(impl).__name__})"
        )
    return impl


def loaded(state: Sequence[Any], groups: int) -> list[Any]:
    """The states of a state dict, one for each group, or ValueError."""
    if not isinstance(state, tuple | list) or len(state) != groups:
        raise ValueError(
            f"state_dict: expected what state_dict() gave, a state for each of {groups} groups of parameters, got "
            f"{type(state).__name__}"
        )
    return list(state)


class Optimizer:
    """Applies a transformation to the `.grad` of parameters, and adds what comes out to them.

    Args:
        params: the tensors, or a tree of them.
        impl: the transformation.

    Example:
        >>> import torch
        >>> from mtml.compat import torchopt
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Optimizer([weight], torchopt.sgd(lr=0.5))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.item()
        0.0
    """

    def __init__(self, params: Iterable[Tensor], impl: GradientTransformation) -> None:
        self.impl = check_impl(impl)
        self.param_groups: list[tuple[Tensor, ...]] = []
        self.param_treespecs: list[pytree.PyTreeSpec] = []
        self.state_groups: list[Any] = []
        self.add_param_group(params if isinstance(params, list | tuple | dict) else tuple(params))

    def add_param_group(self, params: Any) -> None:
        """More parameters, with a state of their own."""
        flat, treespec = pytree.tree_flatten_as_tuple(params)
        for each in flat:
            if not isinstance(each, Tensor):
                raise TypeError(f"params: expected tensors, got {each!r} ({type(each).__name__})")
        self.param_groups.append(flat)
        self.param_treespecs.append(treespec)
        self.state_groups.append(UninitializedState())

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set all gradients to zero, or to None."""
        for param in (p for group in self.param_groups for p in group):
            if param.grad is not None:
                param.grad = None if set_to_none else param.grad.detach().zero_()

    def state_dict(self) -> tuple[Any, ...]:
        """The states themselves, no copies."""
        return tuple(self.state_groups)

    def load_state_dict(self, state_dict: Sequence[Any]) -> None:
        """Take over states, those of the original library too."""
        self.state_groups[:] = loaded(state_dict, len(self.param_groups))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step by the gradients that are there; the loss that the closure, if there is one, returned before it.

        The gradients stay what they are (the original leaves its updates in them).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, (params, state) in enumerate(zip(self.param_groups, self.state_groups, strict=True)):
            state = self.impl.init(params) if uninitialised(state) else state
            grads = tuple(p.grad for p in params)
            updates, self.state_groups[i] = self.impl.update(grads, state, params=params, inplace=False)
            for param, change in zip(params, updates, strict=True):
                if change is not None:
                    param.add_(change)
        return loss
