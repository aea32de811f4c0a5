"""A function of one task on many: in turn, or by torch.func.vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.mapped.arguments import Arguments
from mtml_kernels.checks import shown

__all__ = ["check_result", "drawing", "in_turn", "of_task", "stacked", "vmapped"]

_NO_DRAWING = (
    "randomness: the function draws random numbers; pass randomness='different' for other numbers in every task, or "
    "'same' for the same in all"
)


def vmapped(fn: Callable[..., Any], given: Arguments, randomness: str) -> Any:
    """All tasks at once; raises what torch.func.vmap cannot do."""
    at = [index for index, leaf in enumerate(given.leaves) if isinstance(leaf, Tensor)]

    def one(*tensors: Tensor) -> Any:
        leaves = list(given.leaves)
        for index, tensor in zip(at, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = given.called(leaves)
        return check_result(fn(*args, **kwargs))

    dims = tuple(0 if given.mapped[index] else None for index in at)
    return torch.func.vmap(one, dims, randomness=randomness)(*(given.leaves[index] for index in at))


def in_turn(
    fn: Callable[..., Any], given: Arguments, randomness: str, done: Sequence[Any] = (), until: int | None = None
) -> list[Any]:
    """The tasks' results, one after another; `done`: those of the first. `until`: no further than this task."""
    results = list(done)
    for task in range(len(results), given.tasks if until is None else min(until, given.tasks)):
        results.append(of_task(fn, given, task, given.of_task(task), randomness))
    return results


def of_task(fn: Callable[..., Any], given: Arguments, task: int, leaves: Sequence[Any], randomness: str) -> Any:
    """One task's result, from its leaves."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    args, kwargs = given.called(leaves)
    with drawing(randomness, devices, last=task == given.tasks - 1):
        return check_result(fn(*args, **kwargs))


@contextmanager
def drawing(randomness: str, devices: set[torch.device], last: bool) -> Iterator[None]:
    """One task's run: it may draw no numbers ("error"), or those that every task gets ("same"), or whatever comes."""
    before = None if randomness == "different" else _states(devices)
    yield
    if before is None or (randomness == "same" and last):
        return
    if randomness == "same":
        _restore(before)
    elif any(not torch.equal(a, b) for a, b in zip(before.values(), _states(devices).values(), strict=True)):
        raise RuntimeError(_NO_DRAWING)


def _states(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    found = {torch.device("cpu"): torch.get_rng_state()}
    return found | {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}


def _restore(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def check_result(result: Any) -> Any:
    """A result of tensors; raises TypeError for anything else."""
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"result{pytree.keystr(path)}: expected a tensor, or a tuple, list or dict of such, got {shown(leaf)}; "
                "return the tensor itself, or torch.tensor(value)"
            )
    return result


def stacked(results: Sequence[Any]) -> Any:
    """T equal pytrees as one of tensors [T, ...]."""
    specs = [pytree.tree_structure(result) for result in results]
    for task, spec in enumerate(specs):
        if spec != specs[0]:
            raise ValueError(f"result: expected the form of task 0's for all tasks, got another for task {task}")
    columns = zip(*map(pytree.tree_leaves, results), strict=True)
    return pytree.tree_unflatten([_stack(column) for column in columns], specs[0])


def _stack(column: Sequence[Tensor]) -> Tensor:
    for task, tensor in enumerate(column):
        if tensor.shape != column[0].shape:
            raise ValueError(
                f"result: expected the shape of task 0's, {list(column[0].shape)}, for all tasks, got "
                f"{list(tensor.shape)} for task {task}; pad, or return what has one shape"
            )
    return torch.stack(list(column))
