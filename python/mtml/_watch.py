"""Has a module changed since it was last looked at? Asked on every call, so it must cost a few microseconds.

A layer program describes a module as it was when traced. It is stale after train()/eval(), a replaced submodule or
parameter, a hook, a parametrization, another dtype, or another plain attribute that forward reads. All of these live
in dicts, or in a few attributes of the parameters; both are compared by identity, in loops that run in C.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import nn

__all__ = ["Watch", "structure"]

_PLAIN = (bool, int, float, str, type(None))
_traits = attrgetter("requires_grad", "dtype", "shape", "device")


def _dicts(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Every dict that says what the module is: attributes, tensors, children, hooks."""
    for module in model.modules():
        yield module.__dict__
        for value in module.__dict__.values():
            if isinstance(value, dict):
                yield value


class Watch:
    """A snapshot of a module. Call it: True while nothing has changed."""

    __slots__ = ("empty", "filled", "sizes", "tensors", "traits", "values")

    def __init__(self, model: nn.Module) -> None:
        dicts = list({id(d): d for d in _dicts(model)}.values())
        self.empty = [d for d in dicts if not d]  # most of them, ten for every module: hooks that nobody set
        self.filled = [d for d in dicts if d]
        self.sizes = list(map(len, self.filled))
        self.values = list(chain.from_iterable(map(dict.values, self.filled)))
        self.tensors = [*model.parameters(), *model.buffers()]
        self.traits = list(map(_traits, self.tensors))

    def __call__(self) -> bool:
        return (
            not any(self.empty)
            and list(map(len, self.filled)) == self.sizes
            and all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.values))
            and list(map(_traits, self.tensors)) == self.traits
        )


def structure(model: nn.Module, attributes: bool) -> Hashable:
    """What the module is, as a key: types, tree, modes, tensors, hooks and, where asked, plain attributes."""
    parts: list[Hashable] = []
    for path, module in model.named_modules(remove_duplicate=False):
        inner = module.__dict__
        parts += [path, id(type(module)), id(module), module.training]
        for name, tensor in chain(inner["_parameters"].items(), inner["_buffers"].items()):
            parts += [name, id(tensor), None if tensor is None else _traits(tensor)]
        parts += [(name, len(value)) for name, value in inner.items() if name.endswith("hooks") and value]
        if attributes:
            parts += [
                (name, value) for name, value in inner.items() if isinstance(value, _PLAIN) and name != "training"
            ]
            parts += [name for name, value in inner.items() if callable(value) and not isinstance(value, nn.Module)]
    return tuple(parts)
