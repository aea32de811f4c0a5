"""The Gram matrix of the tasks' meta-gradients in bounded memory: some tasks' gradients at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.adapted import Adapted

__all__ = ["BUDGET", "gram_of_tasks", "some_tasks"]

# Bytes of gradients that are held at once: 32 tasks of a network of 8 million parameters.
BUDGET = 1 << 30

Gradients = Callable[[slice], dict[str, Tensor]]


def some_tasks(value: Any, tasks: slice) -> Any:
    """Tensors [T, ...] of some of the tasks, in a batch or in what a call is given beside it."""
    if isinstance(value, Adapted):
        return value.some(tasks)
    return pytree.tree_map_only(Tensor, lambda t: t[tasks], value)


def gram_of_tasks(gradients: Gradients, tasks: int, bytes_each: int) -> Tensor:
    """Inner products [T, T].

    Args:
        gradients: of some tasks, {name: [n, *shape]}.
        tasks: T.
        bytes_each: of one task's gradients.

    Where all do not fit `BUDGET`, blocks of tasks meet each other two at a time, and of G blocks each is computed about
    G / 2 times over: time is what the memory costs.
    """
    if tasks * bytes_each <= BUDGET:
        return _products(*[gradients(slice(0, tasks))] * 2)
    size = max(BUDGET // (2 * bytes_each), 1)
    blocks = [slice(start, min(start + size, tasks)) for start in range(0, tasks, size)]
    gram: Tensor | None = None
    for i, first in enumerate(blocks):
        ours = gradients(first)
        for second in blocks[i:]:
            found = _products(ours, ours if second is first else gradients(second))
            gram = found.new_empty(tasks, tasks) if gram is None else gram
            gram[first, second] = found
            gram[second, first] = found.T
    assert gram is not None
    return gram


def _products(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """Between the tasks of two blocks [n, m]."""
    pairs = [(ours[name].flatten(1), theirs[name].flatten(1)) for name in ours]
    return torch.stack([a @ b.T for a, b in pairs]).sum(0)
