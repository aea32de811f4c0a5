"""Transforms of a call: which it is under, and ops that refuse a tangent instead of dropping it.

`torch.library.register_autograd` gives an op a rule for backward alone: what carries a tangent and requires no grad
runs through it, and the tangent is gone without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["OpLibrary", "abstract", "alive", "differentiated", "has_tangents", "is_forward_mode", "no_rule", "tracked"]

_transformed = torch._C._are_functorch_transforms_active
_is_batch = torch._C._functorch.is_legacy_batchedtensor


def is_forward_mode() -> bool:
    """Whether a dual level is entered, by forward_ad or by torch.func's jvp, jacfwd or hessian at any depth."""
    level: int = forward_ad._current_level
    return level >= 0


def has_tangents(values: Iterable[Any]) -> bool:
    """Whether one of the tensors, alone or in a list, has a tangent at the level that is looked at."""
    return is_forward_mode() and any(torch._unpack_dual(t, level=0)[1] is not None for t in _tensors(values))


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


class OpLibrary(torch.library.Library):
    """A fragment of the namespace `mtml` whose ops raise for tangents and torch.func's reverse mode; vmap is a loop."""

    def __init__(self, way_out: str) -> None:
        super().__init__("mtml", "FRAGMENT")
        self._way_out = way_out

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        """As torch's, with a look at the arguments before what `register_autograd` made."""
        if dispatch_key == "Autograd":
            fn = _watched(fn, no_rule(op_name, self._way_out))
            torch.library.register_vmap(f"mtml::{op_name}", _one_by_one(op_name), lib=self)
        super().impl(op_name, fn, dispatch_key, **options)


def _watched(kernel: Callable[..., Any], message: str) -> Callable[..., Any]:
    def watched(keyset: Any, *args: Any, **options: Any) -> Any:
        # One transform's level at a time comes by here, the innermost first, with the tensors as that level sees them.
        transformed = torch._C._are_functorch_transforms_active()
        if has_tangents(args):
            raise RuntimeError(message)
        if transformed and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(message)
        return kernel(keyset, *args, **options)

    return watched


def _one_by_one(op_name: str) -> Callable[..., Any]:
    """A rule for vmap, which has none of its own for ops that take lists: a call for each of the batch."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError(f"mtml::{op_name}: expected a batch of at least one under vmap, got none")
        op = getattr(torch.ops.mtml, op_name)
        found = [op(*_selected(args, in_dims, i)) for i in range(info.batch_size)]
        flat = [tree_flatten(outputs)[0] for outputs in found]
        together = [torch.stack(parts) for parts in zip(*flat, strict=True)]
        structure = tree_flatten(found[0])[1]
        return tree_unflatten(together, structure), tree_unflatten([0] * len(together), structure)

    return rule


def _selected(values: Any, dims: Any, i: int) -> Any:
    """The i-th of a batch of arguments; `dims`: None where a value is the same for all."""
    if dims is None:
        return values
    if isinstance(values, list | tuple):
        return [_selected(v, d, i) for v, d in zip(values, dims, strict=True)]
    return values.select(dims, i)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
