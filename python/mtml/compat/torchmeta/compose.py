"""Transforms one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Compose", "parts_of"]

Transform = Callable[[Any], Any]


class Compose:
    """Apply the transforms in turn: torchvision's, for where that is not installed; both are taken."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"


def parts_of(transform: Any) -> list[Transform] | None:
    """The transforms of a Compose, ours or torchvision's; None for anything else."""
    return transform.transforms if type(transform).__name__ == "Compose" else None
