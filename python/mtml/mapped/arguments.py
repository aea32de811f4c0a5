"""The arguments of one call, as tensors with a leading task dimension and what all tasks share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml_kernels.checks import shown

__all__ = ["Arguments", "check_dims", "flattened"]

_PLAIN = bool | int | float | complex | str | bytes | None | torch.dtype | torch.device
Dims = int | None | Sequence[int | None]


class Arguments(NamedTuple):
    """T tasks: `leaves` of the pytree `spec` of (args, kwargs), of which those `mapped` are tensors [T, ...].

    spec: None where the positional arguments are tensors, and there are no others.
    """

    leaves: tuple[Any, ...]
    mapped: tuple[bool, ...]
    spec: Any
    tasks: int

    def called(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leaves as the function takes them."""
        if self.spec is None:
            return tuple(leaves), {}
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def of_task(self, task: int) -> list[Any]:
        """The leaves of one task."""
        return [leaf[task] if own else leaf for leaf, own in zip(self.leaves, self.mapped, strict=True)]

    def first(self, tasks: int) -> Arguments:
        """The first tasks alone."""
        if tasks >= self.tasks:
            return self
        leaves = tuple(leaf[:tasks] if own else leaf for leaf, own in zip(self.leaves, self.mapped, strict=True))
        return self._replace(leaves=leaves, tasks=tasks)

    def tensors(self) -> list[Tensor]:
        """Those among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def objects(self) -> list[Any]:
        """Leaves that are neither tensors nor plain values: what they do and hold is the function's own."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, Tensor | _PLAIN)]

    def unwatched(self) -> str | None:
        """What of them may change in place without a sign, or None."""
        for leaf in self.objects():
            return f"it takes a {type(leaf).__name__}, which may change from call to call"
        return None

    def signature(self) -> Hashable:
        """What of them decides how a call is run: everything but the numbers in tensors and how many tasks there are,
        unless there is one.
        """
        parts = [_signature(leaf, own) for leaf, own in zip(self.leaves, self.mapped, strict=True)]
        return self.spec, self.tasks == 1, tuple(parts)


def _signature(leaf: Any, own: bool) -> Hashable:
    if isinstance(leaf, Tensor):
        return own, leaf.shape[1:] if own else leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, float):
        return "float", leaf.hex()
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    return type(leaf), id(leaf)


def check_dims(in_dims: Any) -> Dims:
    """`in_dims` as torch.vmap has it, of which task_map knows 0 and None."""
    dims = list(in_dims) if isinstance(in_dims, tuple | list) else [in_dims]
    for dim in dims:
        if dim is not None and (isinstance(dim, bool) or dim != 0):
            raise ValueError(
                f"in_dims: expected 0 or None, or one of them for each positional argument, got {shown(in_dims)}; "
                "bring the tasks to the front with tensor.movedim(dim, 0)"
            )
    return tuple(dims) if isinstance(in_dims, tuple | list) else in_dims


def flattened(args: tuple[Any, ...], kwargs: Mapping[str, Any], in_dims: Dims) -> Arguments:
    """The arguments of one call; keyword arguments are mapped, as torch.vmap does it.

    Raises:
        ValueError: tensors without a task dimension, or that disagree on the number of tasks; no task at all.
    """
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
    if len(dims) != len(args):
        raise ValueError(
            f"in_dims: expected {len(args)} entries, one for each positional argument, got {len(dims)}; pass 0 or None "
            "alone for all of them"
        )
    if not kwargs and all(isinstance(value, Tensor) for value in args):
        own = tuple(dim is not None for dim in dims)
        named = [(f"argument {at}", value) for at, value in enumerate(args) if own[at]]
        return Arguments(args, own, None, _tasks(named))
    leaves, mapped, names = [], [], []
    parts = [(f"argument {at}", value, dims[at]) for at, value in enumerate(args)]
    parts += [(f"argument {name!r}", value, 0) for name, value in kwargs.items()]
    for name, value, dim in parts:
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            leaves.append(leaf)
            mapped.append(dim is not None and isinstance(leaf, Tensor))
            names.append(name + pytree.keystr(path))
    tasks = _tasks([(n, leaf) for n, leaf, own in zip(names, leaves, mapped, strict=True) if own])
    return Arguments(tuple(leaves), tuple(mapped), pytree.tree_structure((args, dict(kwargs))), tasks)


def _tasks(tensors: Sequence[tuple[str, Tensor]]) -> int:
    for name, tensor in tensors:
        if tensor.ndim == 0:
            raise ValueError(
                f"{name}: expected a tensor [T, ...] with the tasks first, got {shown(tensor)}; for what all tasks "
                "share pass in_dims=None, or close over it"
            )
    if not tensors:
        raise ValueError("expected an argument with tensors [T, ...], one row a task; got none")
    (first, head), *others = tensors
    for name, tensor in others:
        if tensor.shape[0] != head.shape[0]:
            raise ValueError(
                f"{name}: expected {head.shape[0]} tasks as in {first}, got {shown(tensor)}; every mapped tensor has "
                "the tasks first"
            )
    if not head.shape[0]:
        raise ValueError(f"{first}: expected at least one task, got {shown(head)}")
    return head.shape[0]
