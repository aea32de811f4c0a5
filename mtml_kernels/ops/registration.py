"""How every op becomes `torch.ops.mtml.*`: it and its backward, each with a fake, differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtml_kernels.transforms import has_tangents, no_rule, tensors_in

__all__ = ["OpLibrary", "Rules", "register_op"]


class Rules(NamedTuple):
    """What an op does with its arguments in schema order, and what it does with those of its backward op.

    The gradient of an op is a call of its backward op (`gradient`, on what `setup_context` saved), so that whatever
    traces sees both. The gradient of that gradient is `gradient_again`, on what `setup_again` saved; where there is
    none it raises, because a missing formula would be a silent zero.
    """

    forward: Callable[..., Any]
    forward_fake: Callable[..., Any]
    backward: Callable[..., Any]
    backward_fake: Callable[..., Any]
    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    gradient: Callable[..., tuple[Any, ...]]
    setup_again: Callable[[Any, tuple[Any, ...], Any], None] | None = None
    gradient_again: Callable[..., tuple[Any, ...]] | None = None


def register_op(schemas: tuple[str, str], rules: Rules, *, way_out: str, once: str = "") -> OpLibrary:
    """Defines `mtml::name` and `mtml::name_backward` of these schemas.

    Args:
        once: what is said where the gradient is differentiated again and has no formula.
        way_out: what can be called instead under transforms that have no rule here.

    Returns:
        The library, which must be kept: the ops go with it.
    """

    def raise_once(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(once)

    library = OpLibrary(way_out)
    name, backward = (schema.partition("(")[0] for schema in schemas)
    for schema in schemas:
        library.define(schema)
    library.impl(name, rules.forward, "CompositeExplicitAutograd")
    library.impl(backward, rules.backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mtml::{name}", rules.forward_fake, lib=library)
    torch.library.register_fake(f"mtml::{backward}", rules.backward_fake, lib=library)
    torch.library.register_autograd(f"mtml::{name}", rules.gradient, setup_context=rules.setup_context, lib=library)
    again, setup = rules.gradient_again or raise_once, rules.setup_again
    torch.library.register_autograd(f"mtml::{backward}", again, setup_context=setup, lib=library)
    return library


class OpLibrary(torch.library.Library):
    """A fragment of the namespace `mtml` whose ops raise for tangents and torch.func's reverse mode; vmap is a loop.

    `torch.library.register_autograd` gives an op a rule for backward alone: what carries a tangent and requires no grad
    runs through it, and the tangent is gone without a word.
    """

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
        if transformed and torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(args)):
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
