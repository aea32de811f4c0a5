"""A gradient step on a module, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mtml.clone import Held, descend
from mtml.compat.rate import rate, scalar

__all__ = ["DifferentiableSGD"]


class DifferentiableSGD(nn.Module):
    """``p - lr * grad`` in the place of each parameter p of a module.

    Args:
        lr: a number or a tensor.

    Raises:
        TypeError: a rate that is neither.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> clone = l2l.clone_module(net)
        >>> l2l.optim.DifferentiableSGD(0.1)(clone, [torch.ones(1, 2)])
        >>> torch.allclose(clone.weight, net.weight - 0.1)
        True
    """

    def __init__(self, lr: Any) -> None:
        super().__init__()
        self.lr = rate("lr", lr)

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Step, in place; gradients in the order of ``module.parameters()``, None for what stays.

        Without them: the parameters' `.grad`. Raises ValueError for other gradients in number than parameters.
        """
        held, lr = Held(module), scalar(self.lr)
        if gradients is None:
            gradients = [tensor.grad for tensor in held.tensors]
        if len(gradients) != len(held.tensors):
            raise ValueError(
                f"gradients: expected one for each of the module's {len(held.tensors)} parameters (None for what "
                f"stays), got {len(gradients)}"
            )
        if isinstance(lr, float | int):
            held.replace(descend(held.tensors, gradients, lr))
        else:
            held.replace([None if g is None else t - lr * g for t, g in zip(held.tensors, gradients, strict=True)])
