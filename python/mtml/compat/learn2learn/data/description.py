"""What a task is made of before its data are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["DataDescription"]


class DataDescription:
    """A sample of a task: its index in the data set, and what makes data of the index, in turn."""

    __slots__ = ("index", "transforms")

    def __init__(self, index: int) -> None:
        self.index = int(index)
        self.transforms: list[Callable[[Any], Any]] = []

    def __repr__(self) -> str:
        return f"DataDescription({self.index})"
