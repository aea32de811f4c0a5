"""A module again with other tensors: a copy of its structure that shares everything else with the module."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mtml_kernels.recurrent import RELINKED, relink

__all__ = ["STRUCTURE", "Twins", "twin"]

Replacement = Callable[[Tensor, bool], Tensor]

ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
PLAIN = frozenset(ATOMS) - {type}  # the types themselves, not what is made of them
CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set, frozenset})
DEPTH = 4  # of containers and objects within an attribute that are looked into
ENTRIES = 20_000  # of containers that are looked into, in all: what holds more holds data
STRUCTURE = ("_parameters", "_buffers", "_modules")


class _ScriptTensors(dict[str, Any]):
    """The tensors of a TorchScript module: what is set here is what it computes with."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor)
        self.module._c.setattr(name, tensor)


class Twins:
    """Copies of a module and of all its submodules, `root` among them.

    A module that is registered under several names, or in several places, has one copy. What an attribute holds of the
    modules and their tensors is replaced as well, in lists, dicts, bound methods, closures and objects, so that nothing
    that the copy runs leads back to the original. A compiled module is copied as it was before.

    Args:
        of: `of(tensor, is_parameter)` for each of the module's tensors.
    """

    def __init__(self, module: nn.Module, of: Replacement) -> None:
        self.of, self.left = of, ENTRIES
        self.copies: dict[int, nn.Module] = {}  # by the id of the original
        self.pairs: list[tuple[nn.Module, nn.Module]] = []  # (original, copy)
        self.tensors: dict[int, Tensor] = {}  # replacements by the id of the original
        self.slots: dict[int, list[tuple[dict[str, Any], str]]] = {}  # where the copies hold them
        self.rigid = False  # is a replacement held anywhere else?
        self.root = self._copy(module)
        for original, twin in self.pairs:
            for name, value in original.__dict__.items():
                kind = type(value)
                if kind in PLAIN or (kind in CONTAINERS and not value):  # nearly all that a module has, skipped quickly
                    continue
                if name not in STRUCTURE and name not in RELINKED:
                    twin.__dict__[name] = self.mapped(value)
            relink(twin)

    def _copy(self, module: nn.Module) -> nn.Module:
        found = self.copies.get(id(module))
        if found is not None:
            return found
        if type(module).__name__ == "OptimizedModule":  # what torch.compile made
            self.copies[id(module)] = self._copy(module._modules["_orig_mod"])  # type: ignore[arg-type]
            return self.copies[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module)
        new = self.copies[id(module)] = module.__new__(type(module))
        inner = new.__dict__
        inner.update(module.__dict__)
        inner["_parameters"] = self._tensors(module._parameters, True)
        inner["_buffers"] = self._tensors(module._buffers, False)
        inner["_modules"] = {k: None if m is None else self._copy(m) for k, m in module._modules.items()}
        if inner.get("_compiled_call_impl") is not None:  # by module.compile(), for the original
            inner["_compiled_call_impl"] = None
        self.pairs.append((module, new))
        return new

    def _tensors(self, held: dict[str, Any], is_parameter: bool) -> dict[str, Any]:
        new: dict[str, Any] = {}
        for name, tensor in held.items():
            new[name] = None if tensor is None else self._tensor(tensor, is_parameter, new, name)
        return new

    def _tensor(self, tensor: Tensor, is_parameter: bool, holder: dict[str, Any], name: str) -> Tensor:
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = self.of(tensor, is_parameter)
        self.slots.setdefault(id(tensor), []).append((holder, name))
        return self.tensors[id(tensor)]

    def _script(self, module: nn.Module) -> nn.Module:
        """PyTorch's own deep copy, which is given the tensors afterwards."""
        new = self.copies[id(module)] = copy.deepcopy(module)
        for (_, old), (_, part) in zip(module.named_modules(), new.named_modules(), strict=True):
            holder = _ScriptTensors(part)
            for held, is_parameter in ((old._parameters, True), (old._buffers, False)):
                for name, tensor in held.items():
                    if tensor is not None:
                        holder[name] = self._tensor(tensor, is_parameter, holder, name)
        return new

    def original(self, value: Any) -> Any:
        """A module for its copy; any other value as it is."""
        if not isinstance(value, nn.Module):
            return value
        return next((original for original, twin in self.pairs if twin is value), value)

    def mapped(self, value: Any, depth: int = 0) -> Any:
        """The value with copies in place of the modules that it holds; itself where it holds none."""
        if isinstance(value, ATOMS):
            return value
        if isinstance(value, Tensor):
            self.rigid |= id(value) in self.tensors
            return self.tensors.get(id(value), value)
        if id(value) in self.copies:
            return self.copies[id(value)]
        if depth > DEPTH:
            return value
        if isinstance(value, list | tuple | dict | set | frozenset):
            self.left -= len(value)
            return self._container(value, depth + 1) if value and self.left >= 0 else value
        return self._callable_or_object(value, depth + 1)

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            new = {key: self.mapped(item, depth) for key, item in value.items()}
            if all(a is b for a, b in zip(new.values(), value.values(), strict=True)):
                return value
            if type(value) is dict:
                return new
            twin = value.copy()
            twin.update(new)
            return twin
        items = [self.mapped(item, depth) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        kind = type(value)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    def _callable_or_object(self, value: Any, depth: int) -> Any:
        if isinstance(value, MethodType):
            owner = self.mapped(value.__self__, depth)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = (self.mapped(part, depth) for part in parts)
            same = all(a is b for a, b in zip(parts, (func, args, keywords), strict=True))
            return value if same else partial(func, *args, **keywords)
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, weakref.ref):
            target = value()
            return weakref.ref(self.copies[id(target)]) if id(target) in self.copies else value
        held = getattr(value, "__dict__", None)
        if type(held) is not dict or isinstance(value, torch.jit.ScriptModule):
            return value
        new = self.mapped(held, depth)
        if new is held:
            return value
        twin = copy.copy(value)
        twin.__dict__.update(new)
        return twin

    def _function(self, func: FunctionType, depth: int) -> Any:
        """With cells and defaults of its own where they hold a module."""
        cells = [_contents(cell) for cell in func.__closure__ or ()]
        parts = (cells, func.__defaults__, func.__kwdefaults__)
        new = [self.mapped(part, depth) for part in parts]
        if all(a is b for a, b in zip(parts, new, strict=True)):
            return func
        closure = tuple(c if isinstance(c, CellType) else CellType(c) for c in new[0])
        twin = FunctionType(func.__code__, func.__globals__, func.__name__, new[1], closure)
        twin.__kwdefaults__ = new[2]
        twin.__dict__.update(func.__dict__)
        return twin


def _contents(cell: CellType) -> Any:
    """What is in it; the cell itself where nothing is, yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def twin(module: nn.Module, of: Replacement) -> nn.Module:
    """The module again, with `of(tensor, is_parameter)` for its tensors, as `Twins` makes it."""
    return Twins(module, of).root
