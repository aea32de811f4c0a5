"""Whether a user's loss is a function of its arguments and constants alone, judged by its code, without running it.

Only such a loss may be replaced by a kernel: one that logs, counts, draws or reads what may be another thing at the
next call has to run at every call. What it reads beside its arguments are numbers, words and functions, each under a
name (a global, a cell, a default, an attribute of its module): whoever keeps what was made of it watches those.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mtml_kernels.losses.vocabulary import BUILTINS, LAYERS, NAMES, OPERATIONS

__all__ = ["PATCHED", "live_because"]

_PLAIN = (bool, int, float, str, type(None), type(...), torch.dtype, torch.device)
_TYPES = {*LAYERS, torch.Tensor, torch.dtype, torch.device, bool, int, float, tuple}
_PLACES = (torch, F, torch._C._nn, torch.Tensor)
_CHANGES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR")
_IMPORTS = ("IMPORT_NAME", "LOAD_BUILD_CLASS")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STRANGE = ", which no fused loss is made of"
_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

# What PyTorch's own modules look up at every call: somebody may have put another function in its place.
PATCHED: list[tuple[Any, str]] = [
    *((vars(F), name) for name in sorted(OPERATIONS) if name in vars(F)),
    *((vars(layer), "forward") for layer in LAYERS if "forward" in vars(layer)),
]


class _Live(Exception):
    """The loss must run at every call, and why."""


def live_because(loss: Any) -> str | None:
    """Why a callable loss must run live, or None where its code is arithmetic of its arguments and constants.

    Example:
        >>> live_because(lambda output, target: (output - target).square().mean())
        >>> log = []
        >>> live_because(lambda output, target: log.append(1) or output.mean())
        'it reads log, a list, which may change from call to call'
    """
    try:
        _Reading().follow(loss)
    except _Live as found:
        return str(found)
    return None


class _Reading:
    """What the code of a loss leads to, name by name."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._held: list[Any] = []  # so that no id is given away
        self._names: set[str] = set()  # attributes that the code asks for
        self._modules: list[nn.Module] = []
        self._packages: list[types.ModuleType] = []

    def follow(self, loss: Any) -> None:
        """Raise `_Live` at the first thing that is not a constant or a function of such."""
        if not isinstance(loss, types.FunctionType | functools.partial | nn.Module):
            raise _Live(f"it is a {type(loss).__name__}, whose state may change from call to call")
        self._value("the loss", loss)
        for space, name in PATCHED:
            self._value(name, space[name])
        count = -1
        while count != len(self._seen) + len(self._names):
            count = len(self._seen) + len(self._names)
            known = {name for module in list(self._modules) for name in self._attributes(module)}
            for package in self._packages:
                for name in self._names & vars(package).keys():
                    self._value(name, vars(package)[name])
        strange = sorted(self._names - NAMES - known - set(dir(math) if math in self._packages else ()))
        if strange:
            raise _Live(f"it uses {', '.join(map(repr, strange))}{_STRANGE}")

    def _value(self, name: str, value: Any) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._held.append(value)
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, tuple):
            self._all(name, value)
        elif isinstance(value, functools.partial):
            self._all(name, (value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, staticmethod):
            self._value(name, value.__func__)
        elif isinstance(value, property):
            self._value(name, value.fget)
        elif isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in ("torch", "math"):
            self._packages.append(value)
        elif isinstance(value, type | types.BuiltinFunctionType):
            if value not in _TYPES and not _is_library(value):
                raise _Live(f"it uses {name!r}{_STRANGE}")
        elif not _is_library(value):
            raise _Live(f"it reads {name}, a {type(value).__name__}, which may change from call to call")

    def _all(self, name: str, values: Any) -> None:
        for value in values:
            self._value(name, value)

    # --- modules ----------------------------------------------------------------------------------------------------

    def _module(self, name: str, module: nn.Module) -> None:
        kind = type(module)
        if any(True for _ in (*module.parameters(), *module.buffers())):
            raise _Live(f"it reads tensors of its own ({name} has some)")
        if any(module.__dict__.get(hooks) for hooks in _HOOKS) or "forward" in module.__dict__:
            raise _Live(f"{name} carries hooks or a replaced forward")
        if kind in LAYERS:
            return
        if _package(kind) == "torch" or _overrides(kind):
            raise _Live(f"it runs {name}, a {kind.__name__}{_STRANGE}")
        self._modules.append(module)
        self._names.add("forward")

    def _attributes(self, module: nn.Module) -> Iterator[str]:
        """The names among those asked for that mean something on this module, each followed."""
        own = [base.__dict__ for base in type(module).__mro__ if base is not object and _package(base) != "torch"]
        for space in (module.__dict__, module._modules, *own):
            for name in self._names & space.keys():
                self._value(name, space[name])
                yield name

    # --- code -------------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> None:
        package = _package(function)
        if package == "torch":
            _check_word(function.__name__)
            return
        if package in sys.stdlib_module_names or package in ("numpy", "mtml", "mtml_kernels"):
            raise _Live(f"it calls {function.__name__} of {package}")
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":  # of super()
                self._value(name, _inside(cell))
        self._all("a default", (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))
        for part in _nested(code):
            self._code(part, function.__globals__, set(code.co_freevars))

    def _code(self, code: types.CodeType, space: dict[str, Any], outer: set[str]) -> None:
        if code.co_flags & _ONCE:
            raise _Live("it is a generator or a coroutine")
        for at in dis.get_instructions(code):
            if at.opname in _CHANGES or (at.opname in ("STORE_DEREF", "DELETE_DEREF") and at.argval in outer):
                raise _Live(f"it changes {at.argval or 'what it is given'} at every call")
            if at.opname in _IMPORTS:
                raise _Live("it imports a module or makes a class at every call")
            if at.opname in _ATTRIBUTES:
                self._names.add(at.argval)
            elif at.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(at.argval, space)

    def _global(self, name: str, space: dict[str, Any]) -> None:
        if name in space:
            self._value(name, space[name])
        elif hasattr(builtins, name) and name not in BUILTINS and not name.endswith("Error"):
            raise _Live(f"it calls {name}(){_STRANGE}")


def _is_library(value: Any) -> bool:
    """Is it PyTorch's or math's own function?"""
    name = getattr(value, "__name__", "")
    builtin = isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType)
    if getattr(math, name, None) is value:
        return True
    return builtin and name in NAMES and any(getattr(place, name, None) is value for place in _PLACES)


def _check_word(name: str) -> None:
    if name not in NAMES:
        raise _Live(f"it uses {name!r}{_STRANGE}")


def _overrides(kind: type[nn.Module]) -> bool:
    """Does a class decide itself what a call or an attribute is?"""
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in ("__call__", "__getattr__")) or (
        kind.__getattribute__ is not object.__getattribute__
    )


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
