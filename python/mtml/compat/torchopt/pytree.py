"""Trees of tensors: tuples, lists, dicts, named tuples, by `torch.utils._pytree`; None is no leaf by default."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "PyTreeSpec",
    "tree_add",
    "tree_add_scalar_mul",
    "tree_flatten",
    "tree_flatten_as_tuple",
    "tree_leaves",
    "tree_map",
    "tree_map_",
    "tree_matmul",
    "tree_mul",
    "tree_neg",
    "tree_pos",
    "tree_scalar_mul",
    "tree_structure",
    "tree_sub",
    "tree_sub_scalar_mul",
    "tree_truediv",
    "tree_unflatten",
    "tree_vdot_real",
    "tree_wait",
]

Tree = Any
IsLeaf = Callable[[Any], bool]


@dataclass(frozen=True)
class PyTreeSpec:
    """The structure of a tree; `holes` are the positions of the Nones that are no leaves."""

    spec: _pytree.TreeSpec
    holes: tuple[int, ...] = ()

    @property
    def num_leaves(self) -> int:
        return self.spec.num_leaves - len(self.holes)


def tree_flatten(
    tree: Tree, is_leaf: IsLeaf | None = None, *, none_is_leaf: bool = False
) -> tuple[list[Any], PyTreeSpec]:
    """(the leaves, the structure around them)."""
    every, spec = _pytree.tree_flatten(tree, is_leaf)
    if none_is_leaf:
        return every, PyTreeSpec(spec)
    holes = tuple(i for i, leaf in enumerate(every) if leaf is None)
    return [leaf for leaf in every if leaf is not None], PyTreeSpec(spec, holes)


def tree_unflatten(treespec: PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """The tree of that structure with these leaves."""
    every = list(leaves)
    for place in treespec.holes:
        every.insert(place, None)
    return _pytree.tree_unflatten(every, treespec.spec)


def tree_flatten_as_tuple(
    tree: Tree, is_leaf: IsLeaf | None = None, *, none_is_leaf: bool = False
) -> tuple[tuple[Any, ...], PyTreeSpec]:
    leaves, treespec = tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf)
    return tuple(leaves), treespec


def tree_leaves(tree: Tree, is_leaf: IsLeaf | None = None, *, none_is_leaf: bool = False) -> list[Any]:
    return tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf)[0]


def tree_structure(tree: Tree, is_leaf: IsLeaf | None = None, *, none_is_leaf: bool = False) -> PyTreeSpec:
    return tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf)[1]


def tree_map(
    func: Callable[..., Any], tree: Tree, *rests: Tree, is_leaf: IsLeaf | None = None, none_is_leaf: bool = False
) -> Tree:
    """The tree of func(leaf, what the others hold in its place)."""
    every, spec = _pytree.tree_flatten(tree, is_leaf)
    columns = [every, *(spec.flatten_up_to(other) for other in rests)]
    rows = zip(*columns, strict=True)
    found = [None if row[0] is None and not none_is_leaf else func(*row) for row in rows]
    return _pytree.tree_unflatten(found, spec)


def tree_map_(
    func: Callable[..., Any], tree: Tree, *rests: Tree, is_leaf: IsLeaf | None = None, none_is_leaf: bool = False
) -> Tree:
    """Call func as `tree_map` does, for what it does; returns the tree itself."""
    tree_map(func, tree, *rests, is_leaf=is_leaf, none_is_leaf=none_is_leaf)
    return tree


def tree_pos(tree: Tree) -> Tree:
    return tree_map(operator.pos, tree)


def tree_neg(tree: Tree) -> Tree:
    return tree_map(operator.neg, tree)


def tree_add(*trees: Tree) -> Tree:
    return tree_map(lambda *leaves: functools.reduce(operator.add, leaves), *trees)


def tree_mul(*trees: Tree) -> Tree:
    return tree_map(lambda *leaves: functools.reduce(operator.mul, leaves), *trees)


def tree_matmul(*trees: Tree) -> Tree:
    return tree_map(lambda *leaves: functools.reduce(operator.matmul, leaves), *trees)


def tree_sub(minuend_tree: Tree, subtrahend_tree: Tree) -> Tree:
    return tree_map(operator.sub, minuend_tree, subtrahend_tree)


def tree_truediv(dividend_tree: Tree, divisor_tree: Tree) -> Tree:
    return tree_map(operator.truediv, dividend_tree, divisor_tree)


def tree_scalar_mul(scalar: Any, multiplicand_tree: Tree) -> Tree:
    return tree_map(lambda x: scalar * x, multiplicand_tree)


def tree_add_scalar_mul(tree_x: Tree, tree_y: Tree, alpha: Any = None) -> Tree:
    """x + alpha y; alpha is 1 where it is None."""
    return tree_map(lambda x, y: x.add(y, alpha=1 if alpha is None else alpha), tree_x, tree_y)


def tree_sub_scalar_mul(tree_x: Tree, tree_y: Tree, alpha: Any = None) -> Tree:
    """x - alpha y; alpha is 1 where it is None."""
    return tree_map(lambda x, y: x.sub(y, alpha=1 if alpha is None else alpha), tree_x, tree_y)


def tree_vdot_real(tree_x: Tree, tree_y: Tree) -> float:
    """The real part of the inner product of two trees."""

    def product(x: Tensor, y: Tensor) -> float:
        return float(torch.vdot(x.reshape(-1), y.reshape(-1)).real)

    return sum(tree_leaves(tree_map(product, tree_x, tree_y)))


def tree_wait(future_tree: Tree) -> Tree:
    """The results of a tree of futures."""
    futures, treespec = tree_flatten(future_tree)
    return tree_unflatten(treespec, torch.futures.wait_all(futures))
