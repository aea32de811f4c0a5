"""Inner products and cosines of the gradients of several losses.

gram[i, j] = <g_i, g_j>          affinity[i, j] = <g_i, g_j> / (|g_i| |g_j|),  0 where a gradient is 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtml.balance.gradients import Losses, Shared, gradients
from mtml_kernels.precision import plainly

__all__ = ["gram", "gram_of", "products_of", "task_affinity"]


def gram(losses: Losses, shared: Shared = None) -> Tensor:
    """The inner products [H, H] of the losses' gradients at shared tensors, in float64. The graph stays usable.

    Args:
        losses: [H], a sequence or {name: scalar}, or what `MultiHead.loss` gives. A loss without graph has gradient 0.
        shared: shared parameters (exact, H backward passes through the trunk), or the features that all heads read (H
            passes through the heads alone), or None for the features of losses made with ``separate=True``. Those need
            one pass through the heads in all, whatever is shared: prefer them, H passes through H heads add up.

    Raises:
        ValueError, TypeError: no loss or no shared tensor requires grad, or they are no tensors.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gram([x.sum(), (x * x).sum()], x)
        tensor([[ 2.,  6.],
                [ 6., 20.]], dtype=torch.float64)
    """
    return gram_of(gradients(losses, shared, with_own=False).rows)


def task_affinity(losses: Losses, shared: Shared = None) -> Tensor:
    """The cosines [H, H] between the losses' gradients, in float64: 1 helps, 0 is indifferent, -1 conflicts.

    Arguments and errors as `gram`. A loss whose gradient is 0 has cosine 0 with all, itself included.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> task_affinity({"a": x.sum(), "b": -x.sum()}, x)
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)

    Paper: Du, Czarnecki, Jayakumar, Farajtabar, Pascanu, Lakshminarayanan, "Adapting Auxiliary Losses Using Gradient
    Similarity", 2018 (arXiv:1812.02224).
    """
    products = gram(losses, shared)
    squares = products.diagonal()
    cosines = (products / (squares[:, None] * squares[None, :]).sqrt()).clamp(-1, 1)
    zero = squares == 0
    return cosines.masked_fill(zero[:, None] | zero[None, :], 0)


def gram_of(rows: Sequence[Tensor]) -> Tensor:
    """The inner products [H, H], float64, of gradients in parts [H, *shape]."""
    total = products_of(rows, rows)
    return (total + total.T) / 2


def products_of(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The inner products [H, H], float64, of two batches' gradients in parts [H, *shape]."""
    h, device = first[0].shape[0], first[0].device
    total = torch.zeros(h, h, dtype=torch.float64, device=device)
    with plainly(total):  # autocast would round the gradients to half precision
        for left, right in zip(first, second, strict=True):
            total += (_wide(left) @ _wide(right).T).to(total)
    return total


def _wide(row: Tensor) -> Tensor:
    """[H, numel], in float32 at least."""
    flat = row.flatten(1) if row.ndim > 1 else row[:, None]
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
