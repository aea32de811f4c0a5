"""The base of modules that compute with parameters given to their forward."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["MetaModule", "Params", "chosen"]

Params = Mapping[str, Tensor]


class _Part(OrderedDict[str, Tensor]):
    """A submodule's share of `params`; `whole`: the module that was given all of them, and all of them."""

    whole: tuple[nn.Module, Params]


class MetaModule(nn.Module):
    """A module whose ``forward(..., params=None)`` computes with the tensors in `params`, by name, instead of its own.

    A subclass hands each child its share: ``self.features(x, params=self.get_subdict(params, "features"))``. What
    `params` does not name stays the module's own; a tensor shared by several modules is named once, by its first name.

    Example:
        >>> import torch
        >>> from mtml.compat.torchmeta.modules import MetaLinear
        >>> layer = MetaLinear(2, 1)
        >>> layer(torch.ones(1, 2), params={"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        tensor([[2.]])
    """

    def meta_named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that `params` may replace, each once: those of the MetaModules herein."""
        seen = set()
        for path, module in self.named_modules(prefix=prefix) if recurse else [(prefix, self)]:
            if isinstance(module, MetaModule):
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield (f"{path}.{name}" if path else name), parameter

    def meta_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`meta_named_parameters` without the names."""
        for _, parameter in self.meta_named_parameters(recurse=recurse):
            yield parameter

    def get_subdict(self, params: Params | None, key: str | None = None) -> OrderedDict[str, Tensor] | None:
        """The share of the child `key`, by the names that it knows; None (with a warning) where `params` has none.

        Example:
            >>> from mtml.compat.torchmeta.modules import MetaModule
            >>> list(MetaModule().get_subdict({"head.weight": 1, "trunk.weight": 2}, "head"))
            ['weight']
        """
        if params is None:
            return None
        part = _Part([(inner, params[outer]) for inner, outer in _shares(key, tuple(params))])
        part.whole = getattr(params, "whole", None) or (self, params)
        if not part:
            child = self._modules.get(key or "")
            if child is not None:
                part.update(_shared(child, part.whole))
        if part:
            return part
        warnings.warn(
            f"params: expected tensors for the submodule {key!r} of {type(self).__name__}, got only "
            f"{', '.join(params)}; the submodule uses its own",
            stacklevel=2,
        )
        return None


@functools.lru_cache(maxsize=4096)
def _shares(key: str | None, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(name in the child, name here) of what belongs to the child."""
    if key is None:
        return tuple((name, name) for name in names)
    start = len(key) + 1
    return tuple((name[start:], name) for name in names if name.startswith(f"{key}.") and len(name) > start)


def _shared(module: nn.Module, whole: tuple[nn.Module, Params]) -> dict[str, Tensor]:
    """Tensors in `whole` for parameters of the module that have their name elsewhere."""
    root, params = whole
    names = {id(parameter): name for name, parameter in root.named_parameters() if name in params}
    own = module.named_parameters()
    return {name: params[names[id(parameter)]] for name, parameter in own if id(parameter) in names}


def chosen(module: nn.Module, params: Params, *names: str) -> list[Any]:
    """What a layer computes with, in this order; None for a parameter that it does not have."""
    own = {name: getattr(module, name) for name in names if name not in params}
    if any(tensor is not None for tensor in own.values()) and isinstance(params, _Part):
        own.update(_shared(module, params.whole))
    return [params[name] if name in params else own[name] for name in names]
