"""Which rank this process is, and the one error of a group that has lost a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch.distributed as dist

__all__ = ["Group", "RankLost", "place", "reaching"]

Group: TypeAlias = "dist.ProcessGroup | None"
"""None: the default group of all ranks."""


class RankLost(RuntimeError):
    """Another process of the group has ended, or cannot be reached."""


def place(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where there is no group.

    Raises:
        RuntimeError: this process was started as one of several and has not joined their group.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise RuntimeError(
            f"group: expected the process group of the {count} processes that WORLD_SIZE names, got none; call "
            "torch.distributed.init_process_group() first, or unset WORLD_SIZE to train in this process alone"
        )
    return 0, 1


@contextmanager
def reaching(count: int) -> Iterator[None]:
    """What a collective operation raises where another of the `count` ranks is gone, in our words."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's own errors have no common class of their own
        who = "the other process" if count == 2 else f"another of the {count} processes"
        raise RankLost(f"{who} of this job was killed, has failed, or cannot be reached") from error
