"""The processes of one training: what they tell each other, and who of them speaks.

`torchrun --nproc_per_node N -m mtml train ...` starts them; each trains on its share of every meta-batch. Rank 0 logs,
saves and, once training is over, goes on alone. Their messages travel by gloo, between CPUs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtml.distributed import average_gradients, mean_over_tasks, shard_tasks
from mtml.distributed.group import reaching
from mtml.tasks.errors import DataError
from mtml.tasks.task_batch import TaskBatch
from mtml.train.job import end_at_once, end_with_grace, own_place, remember

__all__ = ["ALONE", "Ranks", "join"]

State = TypeVar("State")


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` of its training. All of them call every method but `main`, in the same order.

    Raises:
        RankLost: from any of them, where another rank has ended.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs and saves."""
        return self.rank == 0

    def share(self, batch: TaskBatch) -> TaskBatch:
        """This rank's tasks of a meta-batch."""
        return batch if self.count == 1 else shard_tasks(batch, rank=self.rank, ranks=self.count)

    def loss(self, losses: Tensor, tasks: int) -> Tensor:
        """What to differentiate, of this rank's losses [t] and the number of tasks of all."""
        return losses.mean() if self.count == 1 else mean_over_tasks(losses, tasks)

    def average(self, params: Iterable[nn.Parameter]) -> None:
        """Average the gradients of all ranks."""
        if self.count > 1:
            average_gradients(params)

    def mean(self, losses: Iterable[Tensor]) -> float:
        """Of the losses [t] of all ranks together."""
        found = torch.cat(list(losses)).double()
        total, tasks = self._sums(float(found.sum()), len(found))
        return total / tasks if tasks else math.nan

    def clock(self, seconds: float, asked: bool) -> tuple[float, bool]:
        """The main rank's seconds, and whether any rank is asked to stop."""
        seconds, wishes = self._sums(seconds if self.main else 0.0, asked)
        return seconds, wishes > 0

    def _sums(self, *values: float) -> list[float]:
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with reaching(self.count):
            dist.all_reduce(sums)
        return sums.tolist()

    def same(self, state: State) -> State:
        """The main rank's `state`, on every rank."""
        if self.count == 1:
            return state
        held = [state]
        with reaching(self.count):
            dist.broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        """Until all ranks have come so far."""
        self._sums(0.0)

    def leave(self) -> None:
        """End the group; the main rank goes on alone."""
        if self.count > 1:
            dist.destroy_process_group()
            end_at_once()


ALONE = Ranks()


def join() -> Ranks:
    """Join the other processes that this one was started with, if any.

    Raises:
        DataError: they cannot be found.
    """
    rank, count = own_place()
    if count == 1:
        return ALONE
    if not dist.is_available():
        raise DataError(f"this torch was built without torch.distributed; unset WORLD_SIZE, which is {count}, and RANK")
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(iter(rendezvous("env://")))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the {count} processes of this job do not find each other ({' '.join(str(error).split())}); start them "
            "with torchrun --nproc_per_node, or unset RANK and WORLD_SIZE"
        ) from error
    remember(store)
    end_with_grace()
    if rank:
        warnings.simplefilter("ignore", UserWarning)  # rank 0 says the same of the same model
    return Ranks(rank, count)
