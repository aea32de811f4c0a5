"""Hooks on gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtml.compat.torchopt.base import GradientTransformation, Kernel, Leaves, transformation

__all__ = ["nan_to_num_hook", "register_hook", "zero_nan_hook"]


def zero_nan_hook(g: Tensor) -> Tensor:
    """The gradient with 0 for every NaN."""
    return g.nan_to_num(nan=0.0)


def nan_to_num_hook(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Callable[[Tensor], Tensor]:
    """A hook that puts these numbers in the place of NaN and the infinities."""
    return partial(torch.nan_to_num, nan=nan, posinf=posinf, neginf=neginf)


@dataclass(frozen=True, eq=False)
class RegisterHook(Kernel):
    hook: Callable[[Tensor], Tensor | None]

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        for grad in grads:
            if grad is not None:
                grad.register_hook(self.hook)
        return list(grads), state


def register_hook(hook: Callable[[Tensor], Tensor | None]) -> GradientTransformation:
    """Put a hook on every update, for the gradients that will flow back through it; changes no update."""
    return transformation(RegisterHook(hook))
