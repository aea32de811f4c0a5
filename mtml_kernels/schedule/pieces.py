"""A call cut into calls of fewer tasks, and their results joined.

A task's own results and gradients are what they are in one call, as far as the provider's kernels promise that
(Triton's do, bit by bit; those of PyTorch's libraries may round another way in a batch of another size). What is summed
over all tasks is summed piece by piece, in their order: equal inputs, cut in the same places, give equal bits, but not
those of one sum over all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtml_kernels.schema.inner_loop import (
    KEEP_NONE,
    KEEP_STEPS,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    Grads,
    InnerLoopArgs,
    Outputs,
)

__all__ = ["Cut", "cotangents_of", "cuts", "joined_gradients", "joined_outputs", "narrowed", "of_all_tasks"]

PARAMS, LR, HYPER = 0, 1, 4  # among `InnerLoopArgs.groups`
Cut = range  # of tasks


def cuts(tasks: int, size: int) -> list[Cut]:
    """The tasks of each piece."""
    return [range(first, min(first + size, tasks)) for first in range(0, tasks, size)]


def _of(t: Tensor | None, cut: Cut, dim: int = 0) -> Tensor | None:
    return None if t is None else t.narrow(dim, cut.start, len(cut))


def _each(tensors: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [t[cut.start : cut.stop] for t in tensors]


def narrowed(a: InnerLoopArgs, cut: Cut) -> InnerLoopArgs:
    """The call of some of its tasks: views of its tensors."""
    own = [flag and a.spec.has(STARTS) for flag in a.spec.adapted]
    return a._replace(
        params=[t[cut.start : cut.stop] if mine else t for t, mine in zip(a.params, own, strict=True)],
        support_x=_each(a.support_x, cut),
        query_x=_each(a.query_x, cut),
        moments=_each(a.moments, cut),
        support_y=a.support_y[cut.start : cut.stop],
        query_y=_of(a.query_y, cut),
        support_mask=_of(a.support_mask, cut),
        query_mask=_of(a.query_mask, cut),
    )


def _task_dims(a: InnerLoopArgs) -> tuple[int, int, list[int]]:
    """The dimension of tasks in loss and output, in the support losses, and in each of what is kept."""
    adapted = sum(a.spec.adapted) if a.spec.keep != KEEP_NONE else 0
    moments = len(a.spec.rule.moments) * sum(a.spec.adapted)
    kept = [int(a.spec.keep == KEEP_STEPS)] * adapted + [0] * moments
    return int(a.spec.has(QUERY_STEPS)), 1, kept


def joined_outputs(a: InnerLoopArgs, pieces: Sequence[Outputs]) -> Outputs:
    """The outputs of the whole call, without a carry."""
    query, support, kept = _task_dims(a)
    loss, output, support_losses, adapted, _ = zip(*pieces, strict=True)
    whole = [torch.cat(parts, dim) for parts, dim in zip(zip(*adapted, strict=True), kept, strict=False)]
    return _loss(a, loss, query), torch.cat(output, query), torch.cat(support_losses, support), whole, []


def _loss(a: InnerLoopArgs, pieces: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat([*pieces], dim) if a.has_loss else pieces[0]


def cotangents_of(
    a: InnerLoopArgs, cut: Cut, loss: Tensor | None, output: Tensor | None, support_losses: Tensor | None,
    adapted: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Those of some tasks."""
    query, support, kept = _task_dims(a)
    found = [_of(t, cut, dim) for t, dim in zip(adapted, kept, strict=False)]
    return _of(loss, cut, query), _of(output, cut, query), _of(support_losses, cut, support), found


def of_all_tasks(a: InnerLoopArgs, group: int, index: int) -> bool:
    """Whether a tensor of a group is one for all tasks, so that its gradient is a sum over them."""
    if group == PARAMS:
        return not (a.spec.has(TASKS_APART) or (a.spec.adapted[index] and a.spec.has(STARTS)))
    return group in (LR, HYPER)


def joined_gradients(a: InnerLoopArgs, pieces: Iterator[tuple[Grads, ...]]) -> tuple[Grads, ...]:
    """The gradients of the whole call; sums over tasks are added up as the pieces come, in their precision."""
    found: list[list[list[Tensor]]] = [[[] for _ in tensors] for _, tensors in a.groups]
    for piece in pieces:
        for group, grads in enumerate(piece):
            for index, grad in enumerate(grads):
                _join(found[group][index], grad, of_all_tasks(a, group, index))
    return tuple(
        [torch.cat(parts).to(own.dtype) if parts else None for parts, own in zip(grads, tensors, strict=True)]
        for grads, (_, tensors) in zip(found, a.groups, strict=True)
    )


def _join(parts: list[Tensor], grad: Tensor | None, summed: bool) -> None:
    if grad is None:
        return
    if summed and parts:
        parts[0] += grad
    else:
        parts.append(grad)
