"""The losses of several heads on shared features: what `mtml.MultiHead.loss` gives and `mtml.balance` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["HeadLosses"]


@dataclasses.dataclass(frozen=True)
class HeadLosses:
    """What `MultiHead.loss` gives; unpacks as ``total, per_head``.

    Attributes:
        total: the weighted loss, a scalar.
        per_head: {head: its own loss, a scalar}, unweighted; 0 for absent heads.
        sources: with ``separate=True`` the features that every present head was given.
        copies: of those, the ones that each head read, whose gradients are the heads' own.
    """

    total: Tensor
    per_head: dict[str, Tensor]
    sources: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    copies: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.total, self.per_head))
