"""Any module as the transform of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

__all__ = ["ModuleTransform", "ReshapedTransform"]


class ReshapedTransform(nn.Module):
    """A module that sees the gradient in another shape; the update has the gradient's own.

    Args:
        transform: the module.
        shape: what it takes, where -1 may stand once.
    """

    def __init__(self, transform: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = tuple(shape)

    def forward(self, grad: Tensor) -> Tensor:
        update: Tensor = self.transform(grad.reshape(self.in_shape))
        return update.reshape(grad.shape)


class ModuleTransform:
    """For each parameter a module made by ``module_cls(numel, numel)``, which takes the gradient as [1, numel].

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> transform = l2l.optim.ModuleTransform(torch.nn.Linear)(torch.nn.Parameter(torch.ones(2, 3)))
        >>> transform(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        numel = parameter.numel()
        return ReshapedTransform(self.module_cls(numel, numel), (1, numel))
