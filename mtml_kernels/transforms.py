"""Transforms of a call: which it is under, and what they make of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

__all__ = [
    "abstract",
    "alive",
    "differentiated",
    "has_tangents",
    "is_forward_mode",
    "no_rule",
    "refuse_transforms",
    "tensors_in",
    "tracked",
    "under_transform",
]

_transformed = torch._C._are_functorch_transforms_active
_is_batch = torch._C._functorch.is_legacy_batchedtensor


def is_forward_mode() -> bool:
    """Whether a dual level is entered, by forward_ad or by torch.func's jvp, jacfwd or hessian at any depth."""
    level: int = forward_ad._current_level
    return level >= 0


def under_transform() -> bool:
    """Whether any transform, dual level or dispatch mode is around."""
    level: int = forward_ad._current_level
    return level >= 0 or _transformed() or torch._C._len_torch_dispatch_stack() > 0


def has_tangents(values: Iterable[Any]) -> bool:
    """Whether one of the tensors, alone or in a list, has a tangent at the level that is looked at."""
    return is_forward_mode() and any(torch._unpack_dual(t, level=0)[1] is not None for t in tensors_in(values))


def alive(saved: Sequence[Any]) -> list[Any]:
    """Tensors that a Function saved, without the wrappings of transforms that have ended since."""
    return [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in saved]


def tracked(t: Tensor) -> bool:
    """Whether torch.func's reverse mode follows a tensor at any of the levels around."""
    while not t.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def differentiated(t: Tensor) -> bool:
    """Whether autograd or a transform around follows a tensor, or vmap has a batch of it."""
    if tracked(t) or has_tangents([t]):
        return True
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(t):
        return False
    if is_forward_mode():  # the tangents of the outer levels cannot be seen from here
        return True
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def abstract(*tensors: Tensor | None) -> bool:
    """Whether cotangents stand for a batch (is_grads_batched, torch.func), may have tangents, or are being traced."""
    if _transformed() or forward_ad._current_level >= 0 or is_compiling():
        return True
    for t in tensors:  # noqa: SIM110  # every backward of a small loss comes by here, and a generator takes as long
        if t is not None and _is_batch(t):
            return True
    return False


def no_rule(op: str, way_out: str) -> str:
    """What is said to one who differentiates `op` in forward mode or by a torch.func transform."""
    return (
        f"mtml::{op} has no rule for forward mode (torch.func.jvp, jacfwd, forward_ad) and for torch.func's transforms "
        f"(grad, vmap, ...). Way out: {way_out}"
    )


def refuse_transforms(what: str, way_out: str) -> None:
    """Raise RuntimeError within torch.func's transforms, where torch.autograd.grad sees nothing of what they follow.

    `what` is called, `way_out` is what can be called instead.
    """
    if _transformed():
        raise RuntimeError(
            f"{what}: it differentiates by torch.autograd.grad, which has no place in torch.func's transforms (grad, "
            f"vmap, jvp, ...). Way out: {way_out}"
        )


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and in lists of them, at any depth."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
