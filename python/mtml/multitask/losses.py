"""What `MultiTaskMAML.meta_loss` gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["MultiTaskLoss"]


@dataclasses.dataclass(frozen=True)
class MultiTaskLoss:
    """The losses of groups of tasks; unpacks as ``total, per_task``.

    total: the groups' losses as the weighting makes them one, a scalar. per_task: {group: [T]}, the query loss of each
    of its tasks. per_group: {group: a scalar}, their mean, unweighted, which `mtml.balance` takes; 0 for groups without
    data.
    """

    total: Tensor
    per_task: dict[str, Tensor]
    per_group: dict[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.total, self.per_task))
