"""learn2learn.vision: models, and what data sets of images there are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["benchmarks", "datasets", "models", "transforms"]  # imported when first used


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
