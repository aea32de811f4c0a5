"""The per-task loop: a differentiable copy of a module for one task, adapted by one gradient step at a time.

It is the loop that learn2learn made common. A copy shares everything with its original but the parameters, which are
tensors computed from the original's: gradients through the copy arrive in the original's `.grad`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.general.twin import twin
from mtml_kernels.recurrent import relink
from mtml_kernels.transforms import refuse_transforms

__all__ = ["clone_module", "inner_gradients", "replace_tensors"]


def clone_module(module: nn.Module, adapted: frozenset[str] = frozenset()) -> nn.Module:
    """A copy whose parameters are differentiable clones of the module's; buffers are shared.

    Args:
        adapted: names of buffers and frozen parameters that will be adapted: the copy gets its own, which require grad.

    Example:
        >>> import torch
        >>> from mtml.clone import clone_module
        >>> net = torch.nn.Linear(2, 1)
        >>> clone_module(net)(torch.ones(1, 2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    named = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}
    done: dict[int, Tensor] = {}

    def of(tensor: Tensor, is_parameter: bool) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = _copied(tensor, is_parameter, named.get(id(tensor)) in adapted)
        return done[id(tensor)]

    return twin(module, of)


def _copied(tensor: Tensor, is_parameter: bool, adapted: bool) -> Tensor:
    if adapted and not tensor.requires_grad:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone() if is_parameter or tensor.requires_grad else tensor


def replace_tensors(module: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put ``new[id(tensor)]`` wherever the module holds that tensor."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in new:
                    held[name] = new[id(tensor)]  # type: ignore[assignment]  # a clone holds plain tensors
        relink(part)


def inner_gradients(
    loss: Tensor, tensors: Mapping[str, Tensor], first_order: bool, allow_unused: bool, allow_nograd: bool
) -> dict[str, Tensor | None]:
    """Gradients of a task's loss for one inner step, by name; None where there is none and that is allowed.

    Raises:
        TypeError, ValueError: the loss is no scalar tensor.
        RuntimeError: a tensor requires no grad, or the loss does not depend on it, and that is not allowed; or the call
            is within a transform of torch.func.
    """
    refuse_transforms("adapt", "meta_loss or adapt_tasks, which take one task too and run in every transform")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one number for the task, got {list(loss.shape)}; take its mean")
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    frozen = [name for name in tensors if name not in wanted]
    if frozen and not allow_nograd:
        raise RuntimeError(
            f"adapt: these parameters do not require grad: {_listed(frozen)}; pass allow_nograd=True to leave them as "
            "they are, or call requires_grad_() on them"
        )
    if not loss.requires_grad:
        raise RuntimeError("adapt: the loss does not require grad; compute it from this clone, outside torch.no_grad()")
    second = not first_order
    grads = torch.autograd.grad(
        loss, list(wanted.values()), retain_graph=second, create_graph=second, allow_unused=True
    )
    found = dict(zip(wanted, grads, strict=True))
    unused = [name for name, grad in found.items() if grad is None]
    if unused and not allow_unused:
        raise RuntimeError(
            f"adapt: the loss does not depend on these parameters: {_listed(unused)}; pass allow_unused=True to leave "
            "them as they are, or compute the loss from this clone"
        )
    return {name: found.get(name) for name in tensors}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def shallow(wrapper: nn.Module, module: nn.Module) -> Any:
    """The wrapper (a MAML) around another module; everything else, its learning rates included, is shared."""
    again = copy.copy(wrapper)
    again.__dict__["_parameters"] = dict(wrapper._parameters)
    again.__dict__["_buffers"] = dict(wrapper._buffers)
    again.__dict__["_modules"] = {**wrapper._modules, "module": module}
    return again
