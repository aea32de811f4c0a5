"""Why a module, or one of its operations, cannot be written as a layer program."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Cannot", "Unfusable"]


class Cannot(Exception):
    """One operation has no counterpart in the layer program; the message says why."""


class Unfusable(Exception):
    """The module cannot be written as a layer program.

    Attributes:
        reasons: one line per obstacle, each naming the module path or graph node and why it stands in the way.
        nodes: what was seen, in the form of `Program.describe()`, with `"fused": False` on the obstacles.
    """

    def __init__(self, reasons: Sequence[str], nodes: Sequence[dict[str, object]] = ()) -> None:
        self.reasons: list[str] = list(reasons)
        self.nodes: list[dict[str, object]] = [dict(node) for node in nodes]
        super().__init__("; ".join(self.reasons))
