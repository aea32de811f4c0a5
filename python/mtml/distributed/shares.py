"""The tasks of a meta-batch divided among ranks, and the loss that makes the division exact."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from mtml.distributed.group import Group, place, reaching
from mtml_kernels.checks import check_steps, shown

__all__ = ["mean_over_tasks", "shard_tasks", "share_of"]

Tasks = TypeVar("Tasks")


def share_of(tasks: int, rank: int, ranks: int) -> slice:
    """Which of `tasks` tasks are the rank's: runs of neighbours, whose lengths differ by at most one.

    Raises:
        ValueError: there is no such rank.

    Example:
        >>> from mtml.distributed import share_of
        >>> [share_of(5, rank, 3) for rank in range(3)]
        [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: expected 0..{ranks - 1} of {ranks} ranks, got {rank}")
    return slice(tasks * rank // ranks, tasks * (rank + 1) // ranks)


def shard_tasks(batch: Tasks, *, rank: int | None = None, ranks: int | None = None, group: Group = None) -> Tasks:
    """This rank's share of a meta-batch that every rank has made: the tasks of `share_of`, as views.

    Which tasks are trained on then does not depend on the number of ranks. Shares differ in size by at most one task;
    where there are more ranks than tasks, some are empty, which `MetaLoss` takes.

    Args:
        batch: a `TaskBatch`, or anything of tensors [T, ...] in tuples, lists and dicts, such as ``start=``.
        rank, ranks: in place of the group's.
        group: of processes; None: all of them.

    Raises:
        ValueError: tensors differ in T, or there is no such rank.
        TypeError: there is no tensor in it, or one without dimensions.

    Example:
        >>> import torch, mtml
        >>> x, y = torch.zeros(5, 10, 1), torch.zeros(5, 10, 1)
        >>> [mtml.distributed.shard_tasks(mtml.TaskBatch(x, y, x, y), rank=r, ranks=2).tasks for r in range(2)]
        [2, 3]
    """
    if (rank is None) != (ranks is None):
        raise ValueError(f"rank, ranks: expected both or neither, got rank={rank} and ranks={ranks}")
    if rank is None or ranks is None:
        rank, ranks = place(group)
    tasks = tasks_of(batch)
    if ranks == 1:
        return batch
    share = share_of(tasks, rank, ranks)
    return pytree.tree_map_only(Tensor, lambda t: t[share], batch)


def tasks_of(batch: Any) -> int:
    """T of a batch; raises as `shard_tasks`."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or not all(t.ndim for t in tensors):
        raise TypeError(f"batch: expected tensors [T, ...] of T tasks, got {shown(batch)}")
    tasks = tensors[0].shape[0]
    if any(t.shape[0] != tasks for t in tensors):
        raise ValueError(f"batch: expected the same T in all tensors [T, ...], got {[t.shape[0] for t in tensors]}")
    return int(tasks)


def mean_over_tasks(losses: Tensor, tasks: int | None = None, *, group: Group = None) -> Tensor:
    """The loss to differentiate on this rank: its average over the ranks is the mean over all tasks of the meta-batch.

    ``losses.sum() * ranks / tasks``. DistributedDataParallel, fully_shard and `average_gradients` average gradients
    over ranks, so that a plain ``losses.mean()`` would weigh a task by the size of the share that it is in.

    Args:
        losses: of this rank's tasks [t], t >= 0.
        tasks: T, of all ranks together; None: they are counted, which is a message between the ranks.
        group: of processes; None: all of them.

    Raises:
        TypeError: a number of tasks that is no int.
        ValueError: losses that are no vector, or fewer tasks in all than here.
        RankLost: another rank has ended.

    Example:
        >>> import torch, mtml
        >>> mtml.distributed.mean_over_tasks(torch.tensor([1.0, 2.0]), 2)
        tensor(1.5000)
    """
    _, ranks = place(group)
    if losses.ndim != 1:
        raise ValueError(f"losses: expected one for each of this rank's tasks, [t], got {shown(losses)}")
    if tasks is None:
        tasks = _counted(losses, ranks, group)
    if check_steps(tasks, "tasks") < max(len(losses), 1) or (ranks == 1 and tasks != len(losses)):
        raise ValueError(
            f"tasks: expected the number of tasks of all ranks together, got {tasks} with {len(losses)} losses on one "
            f"of {ranks} rank(s)"
        )
    return losses.mean() if ranks == 1 else losses.sum() * (ranks / tasks)


def _counted(losses: Tensor, ranks: int, group: Group) -> int:
    if ranks == 1:
        return len(losses)
    count = torch.tensor([len(losses)], device=losses.device)
    with reaching(ranks):
        dist.all_reduce(count, group=group)
    return int(count)
