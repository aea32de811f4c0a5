"""Gradient methods that remember: objects with buffers, so that a state_dict has what they saw."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from torch import nn

from mtml_kernels.checks import check_steps

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["REMEMBERING", "Remembering"]

REMEMBERING = {"gradvac": "GradVac", "modo": "MoDo"}


class Remembering(nn.Module, abc.ABC):
    """A method for H losses that come in one order in every call.

    Given as ``method=`` to `mtml.balance.backward`. A submodule of the model, it is saved and loaded with it.

    Args:
        losses: H, at least 1.
    """

    def __init__(self, losses: int) -> None:
        super().__init__()
        self.losses = check_steps(losses, "losses")
        if not losses:
            raise ValueError("losses: expected their number, at least 1, got 0")

    @abc.abstractmethod
    def weigh(self, gram: Array) -> Array:
        """Weights [H] of finite products gram [H, H]; a loss that is absent has products 0."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    def check(self, gram: Array) -> None:
        """ValueError where there are not H losses."""
        if len(gram) != self.losses:
            raise ValueError(
                f"method: expected {self.losses} losses, as this {type(self).__name__} was made for, got {len(gram)}"
            )
