"""Weights and biases of the building blocks, as their ops take them: with the task dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from mtml_kernels.memory import in_memory, lost

__all__ = ["of_tasks"]


def of_tasks(name: str, t: Any, shared: int) -> Any:
    """[1, ...] of a tensor with so many dimensions, which stands for all tasks; anything else as it is.

    Raises:
        TypeError: its memory is gone, of which PyTorch makes no view.
    """
    if not isinstance(t, Tensor) or t.ndim != shared:
        return t
    if not is_compiling() and lost(t):
        in_memory(name, t)
    return t.unsqueeze(0)
