"""A batch of other numbers in the place of one that torch.compile traces, which has none.

`describe` is traced: it says in constants what a batch looks like. `stand_in` makes one that looks like it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mtml.paths.batch import Batch, Extras

__all__ = ["Description", "describe", "stand_in"]

TASKS = 2  # of a stand-in, whatever the batch has: no choice depends on them, and a graph serves every number

Description = tuple[Any, ...]


def describe(batch: Batch, every: bool = False) -> Description:
    """Shapes, dtypes, devices and requires_grad of all tensors. All sizes but the number of tasks become constants;
    that too with `every`.
    """
    extras = batch.extras or Extras()
    tasked = (batch.parts(), extras.start, extras.moments)
    tasks = list(_tasks(tasked))
    # without a task, or with tensors that disagree, there is an error to be raised, which names the numbers
    every = every or not tasks or tasks[0] == 0 or any(count != tasks[0] for count in tasks)
    weights = "numbers" if isinstance(batch.weights, list) else _describe(batch.weights, True)
    flags = (extras.per_step, extras.query_steps, operator.index(extras.taken), extras.apart)
    return batch.extras is not None, _describe(tasked, every), weights, flags


def stand_in(description: Description, steps: int) -> Batch:
    """A batch of zeros, which are right as values and as ids."""
    more, tasked, weights, (per_step, query_steps, taken, apart) = description
    parts, start, moments = _made(tasked)
    extras = Extras(per_step, query_steps, start, moments, taken, apart) if more else None
    given = [0.0] * (steps + 1) if weights == "numbers" else _made(weights)
    sx, sy, qx, qy, *masks = parts
    batch = Batch(sx, sy, qx, qy, masks[0], masks[1], given, extras)
    batch.signature = "stands in", batch.signature  # what was chosen by looking at zeros is not for other data
    return batch


def _tasks(value: Any) -> Iterator[int]:
    """The first size of every tensor, -1 where there is none."""
    if isinstance(value, Tensor):
        yield value.shape[0] if value.ndim else -1
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tasks(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tasks(item)


def _describe(value: Any, every: bool) -> Description:
    """`every`: with the first sizes, which are otherwise those of the tasks."""
    if isinstance(value, Tensor):
        sizes = tuple(operator.index(size) for size in (value.shape if every else value.shape[1:]))
        return "tensor", sizes, every, value.dtype, value.device.type, value.device.index, value.requires_grad
    if isinstance(value, Mapping):
        return "dict", tuple((name, _describe(item, every)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return "list" if isinstance(value, list) else "tuple", tuple(_describe(item, every) for item in value)
    return "constant", value


def _made(description: Description) -> Any:
    kind, *rest = description
    if kind == "tensor":
        sizes, every, dtype, device_type, index, requires_grad = rest
        device = torch.device(device_type) if index is None else torch.device(device_type, index)
        zeros = torch.zeros(sizes if every else (TASKS, *sizes), dtype=dtype, device=device)
        return zeros.requires_grad_(requires_grad)
    if kind == "dict":
        return {name: _made(item) for name, item in rest[0]}
    if kind in ("list", "tuple"):
        items = [_made(item) for item in rest[0]]
        return items if kind == "list" else tuple(items)
    return rest[0]
