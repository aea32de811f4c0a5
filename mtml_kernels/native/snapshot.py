"""What stood in Python's dicts under names, and whether it still does, compared by the compiled module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtml_kernels.native import availability, engine
from mtml_kernels.native.tensors import call_tensors

__all__ = ["snapshot"]


def snapshot(**parts: list[Any]) -> Callable[[], bool] | None:
    """A function that says whether all is as it is now.

    owners, keys, values: what each mapping has under each key, by identity. tables: dicts of which every name and value
    counts. sized: mappings that have these `sizes`. tensors: of which dtype, shape, device and requires_grad do. typed:
    objects whose types do. None where there is no compiled module, a table is no plain dict, or a tensor is not
    PyTorch's own.
    """
    if availability() is not None:
        return None
    try:
        found: Callable[[], bool] = engine().Snapshot(reader=call_tensors(), **parts)
    except (engine().Malformed, RuntimeError):
        return None
    return found
