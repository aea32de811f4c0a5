"""A model with layers of chosen types replaced by wrappers of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["MetaModule"]


class MetaModule(nn.Module):
    """A model in which each layer of a chosen type is wrapped: adapters, LoRA. The model itself is changed.

    Args:
        module: the model.
        substitutions: {type of a layer: wrapper}, wrapper(layer) -> a module that holds the layer as `module` and has
            `meta_parameters()`, such as `ParameterTransform`.
        freeze_module: the model's own parameters require no grad any more.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.nn import MetaModule, ParameterTransform, Scale
        >>> wrap = lambda layer: ParameterTransform(layer, lambda p: Scale(p.shape))
        >>> meta = MetaModule(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), {torch.nn.Linear: wrap})
        >>> [tuple(p.shape) for p in meta.meta_parameters()]
        [(3, 2), (3,)]
        >>> meta.module()[0]
        Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(
        self,
        module: nn.Module,
        substitutions: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
        freeze_module: bool = True,
    ) -> None:
        super().__init__()
        self.substitutions = dict(substitutions)
        self.freeze_module = freeze_module
        if freeze_module:
            module.requires_grad_(False)
        self.wrapped_module = self._wrapped(module)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            module._modules[name] = self._wrapped(child)
        wrapper = self.substitutions.get(type(module))
        return module if wrapper is None else wrapper(module)

    def _unwrapped(self, module: nn.Module) -> nn.Module:
        inner = module._modules.get("module")
        found = module if inner is None or type(inner) not in self.substitutions else inner
        for name, child in found.named_children():
            found._modules[name] = self._unwrapped(child)
        return found

    def meta_parameters(self, module: nn.Module | None = None) -> Iterator[nn.Parameter]:
        """The wrappers' own, each once."""
        seen: set[int] = set()
        for part in (self.wrapped_module if module is None else module).modules():
            own = getattr(part, "meta_parameters", None)
            for p in () if own is None else own():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield p

    def module(self) -> nn.Module:
        """The model without the wrappers, which are taken off."""
        return self._unwrapped(self.wrapped_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(*args, **kwargs)
