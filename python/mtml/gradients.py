"""Gradients for loops of many small steps, where the host time of torch.autograd.grad itself counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

try:
    from torch.autograd.graph import _engine_run_backward as _run
except ImportError:  # another torch than those this is tested with
    _run = None  # type: ignore[assignment]

__all__ = ["recorded_gradients"]


def recorded_gradients(
    loss: Tensor, tensors: Sequence[Tensor], factor: float = 1.0, retain_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """Gradients of factor * loss that can be differentiated again; None where the loss does not depend on a tensor.

    They are those of ``torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)``, whose checks of its
    arguments take a fifth of the time where the network is small.

    Args:
        loss: one number that requires grad.
        tensors: at least one, each of which requires grad.
        factor: what the gradient begins with, which costs nothing.
        retain_graph: whether the loss can be differentiated once more.

    Example:
        >>> import torch
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> recorded_gradients(x * x, [x], factor=0.5)[0].item()
        3.0
    """
    if loss.dtype.is_complex:
        raise TypeError(f"loss: expected a real number, got {loss.dtype}; take its .real or .abs()")
    if _run is None or has_torch_function_unary(loss):  # a mode that watches what is called, too
        seed = None if factor == 1.0 else torch.full_like(loss, factor, requires_grad=False)
        return torch.autograd.grad(loss, list(tensors), seed, retain_graph, create_graph=True, allow_unused=True)
    seed = torch.full_like(loss, factor, requires_grad=False)
    return _run((loss,), (seed,), retain_graph, True, tuple(tensors), True, accumulate_grad=False)
