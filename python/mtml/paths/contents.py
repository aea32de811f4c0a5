"""What some Python values hold, in tokens that are equal where the contents are.

Identity tells that an attribute was replaced; a list, a dict or a config object changed in place keeps its identity.
Plain containers, arrays, functions and plain objects are looked into; anything else is known by its identity alone.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections import deque
from collections.abc import Hashable, Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Contents", "package_of"]

LIMIT = 4_000  # values looked at, a tenth of a millisecond to compare; beyond them `complete` is False
ARRAY_BYTES = 1 << 14  # of an array that is compared at every call: a copy of so much takes a microsecond

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, torch.dtype, torch.device)
_NO_OWNER = (types.ModuleType, type, type(None))  # what a built-in function belongs to that is no method of an object
_CONTAINERS = (dict, types.MappingProxyType, list, tuple, deque, set, frozenset)
_LIBRARIES = {"torch", "numpy", "builtins", "mtml", "mtml_kernels"}  # what their objects hold is their own affair


def package_of(thing: object) -> str:
    """The top-level package that defines a class or function."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


class Contents:
    """Visit values; then `tokens` say what they hold, and calling it whether the containers met are as they were.

    Tokens keep what they name alive (`held`): an identity is not given to another object meanwhile.
    """

    def __init__(self, versions: bool = True, live: frozenset[int] = frozenset()) -> None:
        self.versions = versions  # whether a tensor written to in place counts as changed
        self.live = live  # ids of tensors of which it does not: whatever is made of the names reads them at every call
        self.tokens: list[Hashable] = []
        self.held: list[object] = []
        self.complete = True
        self.functions: list[Any] = []  # met while visiting, for those who ask what they read in turn
        self.objects: list[object] = []
        self.classes: list[type] = []
        self.modules: list[nn.Module] = []
        self._seen: set[int] = set()
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[Any] = []
        self._sets: list[Any] = []
        self._cells: list[types.CellType] = []
        self._arrays: list[Any] = []
        self._tensors: list[Tensor] = []
        self._slots: list[tuple[object, str]] = []

    # --- looking into values ----------------------------------------------------------------------------------------

    def visit(self, value: Any) -> None:
        """Add what `value` holds."""
        if len(self.tokens) > LIMIT:
            self.complete = False
        elif isinstance(value, float):
            self.tokens.append(("float", value.hex()))  # so that NaN equals itself and 0.0 is not -0.0
        elif isinstance(value, _PLAIN):
            self.tokens.append((type(value), value if not isinstance(value, slice) else repr(value)))
        elif id(value) in self._seen:
            self.tokens.append(("again", id(value)))
        else:
            self._seen.add(id(value))
            self.held.append(value)
            self._look_into(value)

    def _look_into(self, value: Any) -> None:
        if isinstance(value, _CONTAINERS) and len(self.tokens) + len(value) > LIMIT:
            self.complete = False
            self.tokens.append(("large", type(value), id(value), len(value)))
        elif isinstance(value, dict | types.MappingProxyType):
            self._dict(value)
        elif isinstance(value, list | tuple | deque):
            if not isinstance(value, tuple):
                self._lists.append(value)
            self._many(type(value), value)
        elif isinstance(value, set | frozenset):
            self._sets.append(value)
            self.tokens.append((type(value), frozenset(value)))
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray | np.generic | bytearray):
            self._array(value)
        elif isinstance(value, types.FunctionType):
            self._of_function(value)
        elif not self._wrapper(value):
            self._object(value)

    def _many(self, kind: Any, values: Iterable[Any]) -> None:
        at = len(self.tokens)
        self.tokens.append(kind)
        count = 0
        for count, value in enumerate(list(values), 1):  # noqa: B007
            self.visit(value)
        self.tokens[at] = (kind, count)

    def _dict(self, value: Any) -> None:
        if isinstance(value, dict):
            self._dicts.append(value)
        self._many("keys", value)
        self._many("values", value.values())

    def _tensor(self, value: Tensor) -> None:
        version = None
        if self.versions and id(value) not in self.live and not value.is_inference():
            self._tensors.append(value)
            version = value._version
        self.tokens.append(("tensor", id(value), version, value.dtype, tuple(value.shape), value.requires_grad))

    def _array(self, value: Any) -> None:
        size = len(value) if isinstance(value, bytearray) else value.nbytes
        if size > ARRAY_BYTES or (not isinstance(value, bytearray) and value.dtype.hasobject):
            self.complete = False
            self.tokens.append(("array", id(value)))
            return
        if not isinstance(value, np.generic):
            self._arrays.append(value)
        form = () if isinstance(value, bytearray) else (value.dtype.str, value.shape)
        self.tokens.append(("array", form, bytes(value) if isinstance(value, bytearray) else value.tobytes()))

    def _of_function(self, value: types.FunctionType) -> None:
        self.functions.append(value)
        self.tokens.append(("function", id(value.__code__)))
        if package_of(value) in _LIBRARIES:
            return
        self._many("defaults", value.__defaults__ or ())
        if value.__kwdefaults__:
            self.visit(value.__kwdefaults__)
        for cell in value.__closure__ or ():
            self._cells.append(cell)
            self.visit(_inside(cell))
        if value.__dict__:
            self.visit(value.__dict__)

    def _wrapper(self, value: Any) -> bool:
        """Things that stand for a function: methods, partials, properties."""
        inside: list[Any]
        if isinstance(value, types.MethodType):
            inside = [value.__func__, value.__self__]
        elif isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, _NO_OWNER):
            inside = [value.__name__, value.__self__]  # as the append of a list
        elif isinstance(value, functools.partial):
            inside = [value.func, value.args, value.keywords]
        elif isinstance(value, staticmethod | classmethod):
            inside = [value.__func__]
        elif isinstance(value, property):
            inside = [value.fget]
        else:
            return False
        self._many(type(value), inside)
        return True

    def _object(self, value: Any) -> None:
        kind = type(value)
        self.tokens.append(("object", kind, id(value)))
        if isinstance(value, type):
            self.classes.append(value)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
        elif not isinstance(value, types.ModuleType | types.BuiltinFunctionType) and package_of(kind) not in _LIBRARIES:
            self._attributes(value, kind)

    def _attributes(self, value: Any, kind: type) -> None:
        self.objects.append(value)
        slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]
        inner = getattr(value, "__dict__", None)
        self.complete &= bool(slots) or inner is not None
        self._slots += [(value, name) for name in slots]
        self._many("slots", [getattr(value, name, _EMPTY) for name in slots])
        if isinstance(inner, dict):
            self.visit(inner)

    # --- has anything changed? --------------------------------------------------------------------------------------

    def settle(self) -> Contents:
        """Remember the containers as they are now."""
        self._own = [f for f in self.functions if package_of(f) not in _LIBRARIES]
        groups = (self._dicts, self._lists, self._sets, self._cells, self._arrays, self._tensors, self._own)
        self.changeable = any(groups) or bool(self.objects)
        self._values, self._same = self._now()
        return self

    def __call__(self) -> bool:
        """True while nothing that was met has been changed in place since `settle`."""
        if not self.changeable:
            return True
        values, same = self._now()
        return values == self._values and len(same) == len(self._same) and all(map(is_, same, self._same))

    def containers(self) -> list[Any]:
        """The dicts, lists and sets that were met."""
        return [*self._dicts, *self._lists, *self._sets]

    def _now(self) -> tuple[list[Any], list[Any]]:
        """What is compared by value, and what by identity."""
        values: list[Any] = [*map(len, self._dicts), *map(len, self._lists)]
        values += map(frozenset, self._sets)
        values += map(bytes, self._arrays)
        values += [t._version for t in self._tensors]
        same: list[Any] = [getattr(o, name, _EMPTY) for o, name in self._slots]
        for d in self._dicts:
            same += d
            same += d.values()
        for items in self._lists:
            same += items
        for function in self._own:
            same += (function.__code__, function.__defaults__)
        same += map(_inside, self._cells)
        same += [getattr(o, "__dict__", None) for o in self.objects]
        return values, same


_EMPTY = object()


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _EMPTY
