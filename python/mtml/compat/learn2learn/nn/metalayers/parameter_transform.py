"""A layer whose parameters pass through modules before it uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.func import functional_call

__all__ = ["ParameterTransform"]


class ParameterTransform(nn.Module):
    """layer(x) with transform(p) in the place of each of the layer's parameters p.

    Args:
        module: a layer without layers of its own.
        transform: transform(parameter) -> a module p -> p'.

    Raises:
        ValueError: a module that has layers.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.nn import ParameterTransform, Scale
        >>> layer = ParameterTransform(torch.nn.Linear(2, 3), lambda p: Scale(p.shape, alpha=0.0))
        >>> layer(torch.ones(1, 2))
        tensor([[0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    parameter_transforms: nn.ModuleDict

    def __init__(self, module: nn.Module, transform: Callable[[nn.Parameter], nn.Module]) -> None:
        super().__init__()
        nested = [name for name, _ in module.named_parameters() if "." in name]
        if nested:
            raise ValueError(
                f"module: expected a layer without layers of its own, got one with {nested[0]!r}; wrap its layers, as "
                "MetaModule does"
            )
        self.module = module
        self.transform = transform
        self.parameter_transforms = nn.ModuleDict({name: transform(p) for name, p in module.named_parameters()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        new = {name: made(getattr(self.module, name)) for name, made in self.parameter_transforms.items()}
        return functional_call(self.module, new, args, kwargs)

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """The transforms' own."""
        yield from self.parameter_transforms.parameters()
