"""What all loss weightings share."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mtml_kernels.checks import shown

if TYPE_CHECKING:
    from mtml.multihead.heads import Head

__all__ = ["Weighting", "by_head", "checked", "preferences_of", "preferred", "share_among"]


class Weighting(nn.Module, abc.ABC):
    """The losses of H heads as one number.

    `bind` tells it the heads, once; what it learns or remembers lies in parameters and buffers, so a state_dict has it.
    A head is absent where it has no target, or where its loss is exactly 0 (everything ignored or masked out): an
    absent head has weight 0 and moves nothing.
    """

    needs_norms: ClassVar[bool] = False  # whether forward wants the norms of the heads' gradients at the features

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()

    def bind(self, heads: Mapping[str, Head]) -> None:
        """Take the heads' names and kinds, in their order.

        Raises:
            ValueError: already bound to other heads.
        """
        names = tuple(heads)
        if self.names and self.names != names:
            raise ValueError(
                f"weighting: expected a {type(self).__name__} of its own for every MultiHead, got one that weighs "
                f"{', '.join(self.names)}; make another"
            )
        if not self.names:
            self.names = names
            self.setup(heads)

    def setup(self, heads: Mapping[str, Head]) -> None:
        """Make parameters and buffers, [H]."""

    @abc.abstractmethod
    def forward(self, losses: Tensor, present: Tensor, norms: Tensor | None = None) -> Tensor:
        """The total.

        Args:
            losses: [H]; 0 where absent.
            present: [H] bool.
            norms: [H], constants, where `needs_norms`.
        """

    def end_epoch(self) -> None:
        """Tell the weighting that an epoch is over (DWA; the others do nothing)."""

    @property
    def learning(self) -> bool:
        """Whether this call may change what the weighting remembers."""
        return self.training and torch.is_grad_enabled()


def by_head(what: str, given: Mapping[str, float], heads: Mapping[str, Head], default: float) -> Tensor:
    """{head: number} as [H], the default where a head is not named.

    Raises:
        ValueError: a name that is no head.
    """
    unknown = [name for name in given if name not in heads]
    if unknown:
        raise ValueError(f"weighting: expected {what} for {', '.join(heads)}, got one for {unknown[0]!r}")
    return torch.tensor([float(given.get(name, default)) for name in heads])


def preferences_of(given: Mapping[str, float], heads: Mapping[str, Head]) -> Tensor:
    """Preferences [H], 1 where a head is not named.

    Raises:
        ValueError: a name that is no head; all are 0, under which nothing would learn.
    """
    found = by_head("preferences", given, heads, 1.0)
    if not found.any():
        raise ValueError(f"weighting: expected preferences of which one is above 0, got 0 for {', '.join(heads)}")
    return found


def checked(what: str, given: Mapping[str, float] | None, *, least: float = -math.inf) -> dict[str, float]:
    """{head: number} of finite numbers, none below `least`; ValueError otherwise, TypeError for what is no number."""
    for name, value in (given or {}).items():
        number = not isinstance(value, bool) and isinstance(value, Real)
        if not (number and math.isfinite(value) and value >= least):
            bound = "" if least == -math.inf else f" of at least {least:g}"
            kind = ValueError if number else TypeError
            raise kind(f"weighting: expected finite {what}{bound}, got {shown(value)} for {name!r}")
    return dict(given or {})


def share_among(present: Tensor, scores: Tensor) -> Tensor:
    """The softmax [H] of scores over the present heads, 0 for the others."""
    return scores.masked_fill(~present, -math.inf).softmax(0).nan_to_num()  # none present: 0, not 0 / 0


def preferred(preferences: Tensor, present: Tensor) -> Tensor:
    """Preferences [H] brought to sum 1 over the present heads, 0 for the others."""
    kept = torch.where(present, preferences, 0.0)
    total = kept.sum()
    return torch.where(total > 0, kept / total, 0.0)
