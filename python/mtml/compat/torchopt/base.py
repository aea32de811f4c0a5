"""Gradient transformations: pairs of functions, init(params) -> state and update(updates, state) -> both.

>>> import torch
>>> from mtml.compat import torchopt
>>> rule = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(lr=0.1))
>>> params = (torch.zeros(2),)
>>> updates, state = rule.update((torch.tensor([3.0, 4.0]),), rule.init(params), params=params, inplace=False)
>>> updates[0]
tensor([-0.0600, -0.0800])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtml.compat.torchopt import pytree

__all__ = [
    "ChainedGradientTransformation",
    "EmptyState",
    "GradientTransformation",
    "IdentityGradientTransformation",
    "Kernel",
    "Leaves",
    "UninitializedState",
    "identity",
    "kernel_of",
    "transformation",
    "uninitialised",
]

Leaves = Sequence[Any]  # tensors, None where there is none


class EmptyState(NamedTuple):
    """Of a transformation that remembers nothing."""


class UninitializedState(NamedTuple):
    """Of an optimizer before its first step."""


def uninitialised(state: Any) -> bool:
    """Whether no step has been taken; the original's state is another class of the same name."""
    return type(state).__name__ == UninitializedState.__name__


class Kernel(ABC):
    """A transformation on the leaves of trees. Its methods `init` and `update` are those of the transformation."""

    def start(self, params: Leaves) -> Any:
        """The state before the first step."""
        return EmptyState()

    @abstractmethod
    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        """(the next updates, the next state); with `inplace` in the tensors that were given."""

    def init(self, params: Any) -> Any:
        return self.start(pytree.tree_leaves(params, none_is_leaf=True))

    def update(self, updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        flat, treespec = pytree.tree_flatten(updates, none_is_leaf=True)
        own = None if params is None else pytree.tree_leaves(params, none_is_leaf=True)
        found, state = self.step(flat, state, own, inplace)
        return pytree.tree_unflatten(treespec, found), state


class GradientTransformation(NamedTuple):
    """`init(params) -> state` and `update(updates, state, *, params=None, inplace=True) -> (updates, state)`."""

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]

    def chain(self, next: GradientTransformation) -> ChainedGradientTransformation:
        """This one, then the next."""
        return ChainedGradientTransformation(self, next)


def transformation(kernel: Kernel) -> GradientTransformation:
    return GradientTransformation(kernel.init, kernel.update)


def kernel_of(impl: GradientTransformation) -> Kernel | None:
    """What a transformation of ours was made of; None for a pair of other functions."""
    owner = getattr(impl.init, "__self__", None)
    return owner if isinstance(owner, Kernel) else None


class _Identity(Kernel):
    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        return list(grads), state

    def update(self, updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        return updates, state


_IDENTITY = _Identity()


class IdentityGradientTransformation(GradientTransformation):
    """Leaves everything as it is."""

    def __new__(cls) -> IdentityGradientTransformation:
        return super().__new__(cls, _IDENTITY.init, _IDENTITY.update)

    def __reduce__(self) -> tuple[Any, ...]:
        return IdentityGradientTransformation, ()


def identity() -> IdentityGradientTransformation:
    """The transformation that leaves everything as it is."""
    return IdentityGradientTransformation()


class Chain(Kernel):
    """One transformation after another; works on leaves where all of them can, else on the trees themselves."""

    def __init__(self, members: tuple[GradientTransformation, ...]) -> None:
        self.members = members
        self.kernels = [kernel_of(member) for member in members]

    def start(self, params: Leaves) -> Any:
        return tuple(k.start(params) if k else m.init(params) for k, m in zip(self.kernels, self.members, strict=True))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        self._check(state)
        updates, states = list(grads), []
        for kernel, member, own in zip(self.kernels, self.members, state, strict=True):
            if kernel:
                updates, own = kernel.step(updates, own, params, inplace)
            else:
                updates, own = member.update(updates, own, params=params, inplace=inplace)
            states.append(own)
        return updates, tuple(states)

    def init(self, params: Any) -> Any:
        return super().init(params) if all(self.kernels) else tuple(member.init(params) for member in self.members)

    def update(self, updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        if all(self.kernels):
            return super().update(updates, state, params=params, inplace=inplace)
        self._check(state)
        states = []
        for member, own in zip(self.members, state, strict=True):
            updates, own = member.update(updates, own, params=params, inplace=inplace)
            states.append(own)
        return updates, tuple(states)

    def _check(self, state: Any) -> None:
        if not isinstance(state, tuple | list) or len(state) != len(self.members):
            raise ValueError(
                f"state: expected what init gave, a state for each of {len(self.members)} transformations, got "
                f"{type(state).__name__}; call init(params) first"
            )


class ChainedGradientTransformation(GradientTransformation):
    """Transformations one after another; identities among them, and chains within the chain, are resolved."""

    transformations: tuple[GradientTransformation, ...]

    def __new__(cls, *transformations: GradientTransformation) -> ChainedGradientTransformation:
        members: list[GradientTransformation] = []
        for each in transformations:
            if isinstance(each, ChainedGradientTransformation):
                members.extend(t for t in each.transformations if not isinstance(t, IdentityGradientTransformation))
            elif not isinstance(each, IdentityGradientTransformation):
                members.append(each)
        kernel = Chain(tuple(members) or (identity(),))
        instance = super().__new__(cls, kernel.init, kernel.update)
        instance.transformations = kernel.members
        return instance

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ChainedGradientTransformation):
            return self.transformations == other.transformations
        return isinstance(other, GradientTransformation) and self.transformations == (other,)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.transformations)

    def __repr__(self) -> str:
        return f"ChainedGradientTransformation({', '.join(map(repr, self.transformations))})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ChainedGradientTransformation, self.transformations
