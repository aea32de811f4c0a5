"""Nested settings, and copies of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["flatten", "get_func_params", "recursive_map"]


def flatten(x: Any) -> list[Any]:
    """What nested lists, tuples, sets and dicts (their values) hold, in order.

    Example:
        >>> flatten({"lr": [0.1], "betas": [(0.9, 0.999)]})
        [0.1, 0.9, 0.999]
    """
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in flatten(value)]
    if isinstance(x, list | tuple | set):
        return [leaf for value in x for leaf in flatten(value)]
    return [x]


def recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """`map_fn` of whatever nested lists, tuples, sets and dicts hold, in the same structure."""
    if isinstance(target, dict):
        return type(target)({key: recursive_map(value, map_fn) for key, value in target.items()})
    if isinstance(target, list | tuple | set):
        new = [recursive_map(value, map_fn) for value in target]
        return type(target)(*new) if hasattr(target, "_fields") else type(target)(new)
    return map_fn(target)


def copied(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A leaf of its own with the tensor's values, on the device, that requires grad where the tensor does."""
    return tensor.detach().to(device, copy=True).requires_grad_(tensor.requires_grad)


def get_func_params(module: nn.Module, device: torch.device | None = None, safe_copy: bool = True) -> list[Tensor]:
    """The module's parameters apart from its graph: copies, or with ``safe_copy=False`` tensors of the same memory.

    Example:
        >>> import torch
        >>> weight, bias = get_func_params(torch.nn.Linear(2, 1))
        >>> weight.is_leaf, weight.requires_grad
        (True, True)
    """
    if safe_copy:
        return [copied(p, device) for p in module.parameters()]
    return [p.detach().to(device).requires_grad_(p.requires_grad) for p in module.parameters()]


_recursive_map = recursive_map  # scripts use the original's name
