"""What of a prepared path a graph made of it depends on, as a key: paths of equal form make equal graphs.

Tensors are inputs of a graph: their kinds count, and which of them are one, but not their values. Of the package's own
objects all attributes count, but where they say themselves what calls read (`read_by_calls`); of anything else the
identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtml.paths.contents import package_of

__all__ = ["form_of"]

_OURS = {"mtml", "mtml_kernels"}
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device)


def form_of(value: Any) -> Hashable:
    """The key. It names foreign objects by their ids: whoever keeps it keeps the value too."""
    return _form(value, {})


def _form(value: Any, places: dict[int, int]) -> Hashable:
    """`places`: of the tensors that were met, by their ids. One that stands in two places is one input of a graph."""
    if isinstance(value, Tensor):
        place = places.setdefault(id(value), len(places))
        return place, type(value), value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad
    if isinstance(value, float):
        return "float", value.hex()  # so that NaN equals itself and 0.0 is not -0.0
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(_form(item, places) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((name, _form(item, places)) for name, item in value.items())
    if package_of(type(value)) in _OURS and not isinstance(value, nn.Module):
        return type(value), _form(_attributes(value), places)
    return "object", id(value)


def _attributes(value: Any) -> Mapping[str, Any]:
    if hasattr(value, "read_by_calls"):
        found: Mapping[str, Any] = value.read_by_calls()
        return found
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return vars(value)
