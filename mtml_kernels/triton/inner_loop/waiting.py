"""Gradients in pieces, and what is made of them: both wait until somebody reads the result.

So the layers' sums, each with what goes along with it, are one launch at the end of a step instead of one behind each
layer's product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtml_kernels.schedule.call import Part

__all__ = ["Waiting"]


class Waiting:
    """What a schedule's calls have left so far.

    `pieces`: by gradient, the plane of its pieces. `root`: of a plane, whose memory it is.
    """

    def __init__(self, root: Sequence[int]) -> None:
        self.pieces: dict[int, int] = {}
        self._root = root
        self._parts: list[Part] = []
        self._late: tuple[int, ...] = ()  # planes that calls have let go of, which parts that wait are to read

    def reads_pieces(self, part: Part) -> bool:
        """Whether a part reads a gradient that has not been put together."""
        return not self.pieces.keys().isdisjoint(part.reads)

    def takes(self, part: Part) -> None:
        """A pointwise part that reads such a gradient waits from now on."""
        self._parts.append(part)

    def due(self, part: Part | None) -> list[Part]:
        """All that waits, if this part reads one of the results or changes an operand in place, or if there is none."""
        if part is not None and not any(self._is_due(waiting, part) for waiting in self._parts):
            return []
        found, self._parts = self._parts, []
        return found

    def _is_due(self, waiting: Part, part: Part) -> bool:
        changed = self._root[part.reads[0]] if part.kernel == "accumulate" else None
        return not set(waiting.writes).isdisjoint(part.reads) or changed in self._roots(waiting.reads)

    def _roots(self, planes: Iterable[int]) -> set[int]:
        return {self._root[plane] for plane in planes if plane >= 0}

    def drops(self, planes: Sequence[int], steps: int) -> tuple[int, ...]:
        """What may be let go of after a call of so many steps whose `planes` nobody else reads."""
        ended = (*self._late, *planes)
        needed = {plane for waiting in self._parts for plane in waiting.reads}
        self._late = tuple(plane for plane in ended if plane in needed or not steps)
        return tuple(plane for plane in ended if plane not in self._late)
