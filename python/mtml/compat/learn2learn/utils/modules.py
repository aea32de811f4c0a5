"""Modules whose parameters are tensors with a history."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from mtml import clone
from mtml.clone import Held

__all__ = ["clone_module", "clone_named_parameters", "clone_parameters", "detach_module", "update_module"]

Module = TypeVar("Module", bound=nn.Module)


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Differentiable clones."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Differentiable clones by name."""
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: Any, memo: dict[Any, Tensor] | None = None) -> Any:
    """A copy whose parameters are differentiable clones; gradients through it arrive in the original's `.grad`.

    Buffers are shared, running statistics among them, but those that require grad. Shared parameters stay shared, and
    what the module's attributes hold of its submodules and tensors is the copy's.

    Args:
        module: any module; what is none is returned as it is.
        memo: clones so far, {id of a tensor: its clone}: of modules that share tensors, and are cloned one by one.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn import clone_module
        >>> net = torch.nn.Linear(2, 1)
        >>> clone_module(net)(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    return clone.clone_module(module, done=memo) if isinstance(module, nn.Module) else module


def update_module(
    module: Module, updates: Sequence[Tensor | None] | None = None, memo: dict[Tensor, Tensor] | None = None
) -> Module:
    """Put ``p + update`` in the place of each parameter p, in the module itself; differentiable in both.

    Args:
        updates: in the order of ``module.parameters()``, None for what stays; None: the tensors' attributes `update`,
            of buffers too.
        memo: {tensor: what to put in its place}: of modules that share tensors, and are updated one by one; added to.

    Returns:
        The module.

    Raises:
        ValueError: other updates in number than parameters.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn import clone_module, update_module
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> clone = update_module(clone_module(net), [torch.ones(1, 2)])
        >>> torch.equal(clone.weight, net.weight + 1)
        True
    """
    held = Held(module, buffers=updates is None)
    known: dict[Tensor, Tensor] = {} if memo is None else memo
    if updates is None:
        updates = [_taken(tensor) for tensor in held.tensors]
    elif len(updates) != len(held.tensors):
        raise ValueError(
            f"updates: expected one for each of the module's {len(held.tensors)} parameters (None for what stays), got "
            f"{len(updates)}"
        )
    for tensor, update in zip(held.tensors, updates, strict=True):
        if update is not None and tensor not in known:
            known[tensor] = tensor + update
    held.replace([known.get(tensor) for tensor in held.tensors])
    return module


def _taken(tensor: Tensor) -> Tensor | None:
    """The tensor's attribute `update`, which is gone then."""
    update: Tensor | None = getattr(tensor, "update", None)
    if update is not None:
        tensor.update = None  # type: ignore[attr-defined]  # users set it
    return update


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cut the module's parameters, and buffers that require grad, from their history, in place.

    Args:
        keep_requires_grad: what required grad requires it still, as a leaf of its own.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn import clone_module, detach_module
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = clone_module(net)
        >>> detach_module(clone, keep_requires_grad=True)
        >>> clone(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad is None, clone.weight.grad
        (True, tensor([[1., 1.]]))
    """
    if not isinstance(module, nn.Module):
        return
    for tensor in Held(module, buffers=True).tensors:
        if tensor.requires_grad:
            tensor.detach_()
            tensor.requires_grad_(keep_requires_grad)
