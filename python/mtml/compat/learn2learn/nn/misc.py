"""Small layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Flatten", "Lambda", "Scale", "freeze", "unfreeze"]

Module = TypeVar("Module", bound=nn.Module)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """[N, ...] -> [N, F]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


class Scale(nn.Module):
    """x * alpha, where alpha [*shape] is learned.

    Args:
        shape: an int, a shape, or None for [1].
        alpha: every element at the start.
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        sizes = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(sizes) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: Module) -> Module:
    """The module, whose parameters require no grad and have no history any more."""
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: Module) -> Module:
    """The module, whose parameters require grad."""
    return module.requires_grad_(True)
