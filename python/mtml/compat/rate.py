"""Numbers as the originals take them, numpy's and tensors of one element too, in the forms that are computed with here.

They multiply by whatever they are given, so scripts pass rates as they came: out of a `linspace`, a config, a tensor.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import shown

__all__ = ["count", "number", "rate", "scalar"]


def number(value: Any) -> Any:
    """A number or an array of numpy's that is one number, as a float (an integer as an int); others are themselves.

    Example:
        >>> import numpy
        >>> number(numpy.float32(0.5)), number(numpy.array([0.25])), number(3)
        (0.5, 0.25, 3)
    """
    if isinstance(value, bool | int | Tensor) or type(value) is float:
        return value
    if isinstance(value, Real) or (hasattr(value, "__array__") and getattr(value, "size", 0) == 1):
        found = value.item() if hasattr(value, "item") else float(value)
        return found if isinstance(found, bool | int | float) else value
    return value


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, numpy's too; ValueError for a lower one, TypeError for what is none."""
    found = number(value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{name}: expected an int of at least {least}, got {shown(value)}")
    if found < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {found}")
    return found


def rate(name: str, value: Any) -> Any:
    """`number`, True as 1; TypeError for what is neither a number nor a tensor."""
    found = float(value) if isinstance(value, bool) else number(value)
    if not isinstance(found, float | int | Tensor):
        raise TypeError(f"{name}: expected a number or a tensor, got {shown(value)}")
    return found


def scalar(value: Any) -> Any:
    """`number`, and a tensor of one element without its dimensions: a rate for all steps, where [1] is one for one.

    Example:
        >>> scalar(torch.tensor([[0.5]]))
        tensor(0.5000)
    """
    value = number(value)
    return torch.reshape(value, ()) if isinstance(value, Tensor) and value.ndim and value.numel() == 1 else value
