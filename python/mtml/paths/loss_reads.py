"""What callable losses read, so that what was made of one is dropped when that changes.

A loss that is a function of its arguments and constants alone may be recognised as one of the kernels' and not run any
more; its constants stand under names, which are watched. Every other loss runs live, whatever it reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from mtml.paths.reach import Reach
from mtml_kernels.losses import Opaque, live_because, resolve, takes
from mtml_kernels.losses.purity import PATCHED

__all__ = ["LossReads", "Verdicts", "tokens_of"]

CHANGES = (
    4  # a constant that changes more often is annealed: to prepare for each of its values costs more than it gives
)
LOSSES = 8  # whose changes are counted

Verdicts = Mapping[int, Reach | str]  # by the id of a callable loss: what it reads, or why it runs live


class _Last(NamedTuple):
    loss: Any  # held, so that its id is not given to another
    reach: Reach  # likewise of what it reads
    changes: int


class LossReads:
    """Looks into the callable losses of one learner, and counts how often what they read has changed."""

    def __init__(self) -> None:
        self._last: dict[int, _Last] = {}

    def look(self, losses: Sequence[Any]) -> Verdicts:
        """A verdict for every loss that no name tells."""
        unknown = [loss for loss in losses if not isinstance(loss, str | None) and _unknown(loss)]
        return {id(loss): self._look(loss) for loss in unknown}

    def _look(self, loss: Any) -> Reach | str:
        why = "it takes an output alone" if takes(loss, 1) else live_because(loss)
        if why is not None:
            return why
        reach = _reach(loss)
        if not reach.complete:
            return "it reads more than can be watched"
        last = self._last.pop(id(loss), None)
        changes = 0 if last is None else last.changes + (last.reach.contents.tokens != reach.contents.tokens)
        self._last[id(loss)] = _Last(loss, reach, changes)
        while len(self._last) > LOSSES:
            self._last.pop(list(self._last)[0], None)  # noqa: RUF015 - other threads may add to it meanwhile
        return reach if changes <= CHANGES else "what it reads changes from call to call"


def tokens_of(verdicts: Verdicts) -> list[Hashable]:
    """What tells a loss that was changed in place from what it was."""
    found: list[Hashable] = []
    for verdict in verdicts.values():
        found += [verdict] if isinstance(verdict, str) else verdict.contents.tokens
    return found


def _unknown(loss: Any) -> bool:
    found = resolve(loss)
    return isinstance(found, Opaque) and found.unknown


def _reach(loss: Any) -> Reach:
    """What a loss reads, PyTorch's losses included, in whose place another function may be put."""
    if isinstance(loss, nn.Module):
        modes = [(m.__dict__, name) for m in loss.modules() for name in ("training", "_modules")]
        return Reach(loss, PATCHED + modes)
    holder = nn.Module()
    holder.__dict__["forward"] = loss
    return Reach(holder, PATCHED)
