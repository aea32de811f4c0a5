"""Has a module changed since it was last looked at? Asked on every call, so it must cost a few microseconds.

A layer program describes a module as it was when traced. It is stale after train()/eval(), a replaced submodule or
parameter, a hook, a parametrization, another dtype, or a change of anything else that forward can read
(`mtml.paths.reach`). All of it stands in dicts under names, or in a few attributes of the parameters; what stood there
is compared by identity, in loops that run in C.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import chain
from operator import attrgetter, getitem, is_
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from mtml.paths.contents import Contents
from mtml.paths.reach import Reach

__all__ = ["Watch", "structure"]

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [vars(module_hooks)[f"_global{name}"] for name in _HOOKS]
_OWN = ("_paths", "_taken", "_rule_state")  # of a MAML: what it writes itself
_traits = attrgetter("requires_grad", "dtype", "shape", "device")


class Watch:
    """A snapshot of a MAML, its model and what it was given beside it. Call it: True while nothing has changed."""

    __slots__ = (
        "dicts", "empty", "entries", "filled", "keys", "modules", "names", "options", "owners", "reach", "sizes",
        "tensors", "traits", "types", "values",
    )  # fmt: skip

    def __init__(self, maml: Any, reach: Reach, options: Contents) -> None:
        self.reach, self.options = reach, options
        self.modules = list(maml.modules())
        self.types = list(map(type, self.modules))
        pairs: list[tuple[Mapping[str, Any], str]]
        pairs = [(m.__dict__, name) for m in self.modules for name in ("training", *_TABLES, *_HOOKS)]
        pairs += reach.pairs
        # of the MAML itself and of modules beside the model (rates, losses, update rules) every attribute counts
        seen = {id(m) for m in maml.module.modules()}
        others = [m.__dict__ for m in self.modules if id(m) not in seen]
        pairs += [(d, name) for d in others for name in d if name not in _OWN]
        self.owners, self.keys = [d for d, _ in pairs], [name for _, name in pairs]
        self.values = list(map(getitem, self.owners, self.keys))
        tables = [m.__dict__[name] for m in self.modules for name in (*_TABLES, *_HOOKS)] + _GLOBAL_HOOKS
        self.empty = [d for d in tables if not d]  # most of them: hooks that nobody set
        self.filled = [d for d in tables if d]
        self.names = list(chain.from_iterable(self.filled))
        self.entries = list(chain.from_iterable(map(dict.values, self.filled)))
        self.dicts = [m.__dict__ for m in self.modules]
        self.sizes = list(map(len, self.dicts))
        self.tensors = [*maml.parameters(), *maml.buffers()]
        self.traits = list(map(_traits, self.tensors))

    def __call__(self) -> bool:
        try:
            return (
                not any(self.empty)
                and list(chain.from_iterable(self.filled)) == self.names
                and list(map(len, self.dicts)) == self.sizes
                and all(map(is_, map(getitem, self.owners, self.keys), self.values))
                and all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.entries))
                and list(map(_traits, self.tensors)) == self.traits
                and list(map(type, self.modules)) == self.types
                and self.reach()
                and self.options()
            )
        except KeyError:  # a name is gone
            return False


def structure(model: nn.Module) -> Hashable:
    """What the module is, as a key: types, tree, modes, tensors, hooks."""
    parts: list[Hashable] = [tuple(map(len, _GLOBAL_HOOKS))]
    for path, module in model.named_modules(remove_duplicate=False):
        inner = module.__dict__
        parts += [path, id(type(module)), id(module), module.training]
        for name, tensor in chain(inner["_parameters"].items(), inner["_buffers"].items()):
            parts += [name, id(tensor), None if tensor is None else _traits(tensor)]
        parts += [(name, len(value)) for name, value in inner.items() if name.endswith("hooks") and value]
    return tuple(parts)
