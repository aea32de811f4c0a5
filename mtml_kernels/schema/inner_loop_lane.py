"""The fast lane of `inner_loop`: what a backend has for calls whose tensors need only to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mtml_kernels.schema.inner_loop import InnerLoopArgs

__all__ = ["FastLane", "LaneCall"]


class LaneCall(NamedTuple):
    """What runs calls of one form.

    forward: addresses -> ((loss, output, support_losses, adapted parameters ..), carry).
    backward: (cotangents, the carry's first) -> None for each of three arguments, then a gradient for every tensor that
        requires grad, in the order of `InnerLoopArgs.tensors`; None for cotangents of more than the losses, or that
        must be converted. Without it the backend's own backward runs, from the same carry.
    """

    forward: Callable[[bytes], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    backward: Callable[[tuple[Tensor | None, ...], Tensor], tuple[Tensor | None, ...] | None] | None


@dataclasses.dataclass(frozen=True)
class FastLane:
    """A backend's way for calls on plain tensors: what is the same for calls of one form is made once."""

    # (lists and single tensors as `InnerLoopArgs` has them) -> form, addresses; None where one is not plain.
    read: Callable[..., tuple[bytes, bytes] | None]
    # None where calls of this form are not for the lane.
    make: Callable[[InnerLoopArgs], LaneCall | None]
    calls: dict[Any, Any] = dataclasses.field(default_factory=dict)  # of the op, by form
    checked: dict[Any, Any] = dataclasses.field(default_factory=dict)  # of the function, by form and options
    rates: dict[Any, list[Tensor]] = dataclasses.field(default_factory=dict)  # by number: those last used
