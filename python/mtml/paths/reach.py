"""What the forward of a model can read besides its tensors, found by following names from one function to the next.

Python code reads attributes, class attributes, globals and closures, each by a name that stands in its bytecode. From
the forward of every module on, all namespaces that such a name can mean are collected: more than is read, never less,
but for what is asked for by a computed name (then every attribute counts) or comes from outside Python.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from mtml.paths.contents import Contents, package_of

__all__ = ["Reach"]

_CALLED = ("forward", "__call__", "__getattr__", "__getattribute__", "__init_subclass__")
# Code with one of these may read any attribute.
_COMPUTED = {"getattr", "hasattr", "vars", "__dict__", "attrgetter", "eval", "exec", "globals", "locals", "dir"}
_OTHERS = {"torch", "numpy", "mtml", "mtml_kernels", *sys.stdlib_module_names}  # their code reads nothing of the user's
_INTERNAL = {*vars(nn.Module()), "training"}  # what every module has: in `Watch` and `structure`
_FREE = {"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "IMPORT_FROM"}
_ABSENT = object()

Namespace = Mapping[str, Any]


class _Space(NamedTuple):
    """A namespace that attributes are looked up in; `every`: all its names count, not only those in code."""

    names: Namespace
    every: bool


class Reach:
    """The names that forward can read, as pairs of a namespace and a name, and what stands there.

    For who watches it: `pairs`; `classes`, the namespaces of classes, with their `sizes`; and `contents`, which tells
    whether what the pairs hold has been changed in place. `codes`: those of the functions that were followed. `also`:
    further pairs to watch; `contents_of`: another reading of what the pairs hold.
    """

    def __init__(
        self,
        model: nn.Module,
        also: Sequence[tuple[Namespace, str]] = (),
        contents_of: Callable[[], Contents] = Contents,
    ) -> None:
        self._contents_of = contents_of
        self.foreign = False  # code of the user's can be reached: it may read what no name shows
        self._names: set[str] = set(_CALLED)
        self._computed = False
        self._spaces: dict[int, _Space] = {}
        self._pairs: dict[tuple[int, str], Namespace] = {}
        self.codes: set[types.CodeType] = set()
        self._seen = contents_of()
        for module in model.modules():
            self._module(module)
        self._follow()
        self.pairs = [(space, name) for (_, name), space in self._pairs.items()] + list(also)
        self.classes = [space.names for space in self._spaces.values() if not isinstance(space.names, dict)]
        self._take(self._look())

    def same(self) -> bool:
        """Whether what can be read is equal to what it was, in whatever objects; if so, takes those for the present."""
        now = self._look()
        if now.tokens != self.contents.tokens or any(pair not in self._pairs for pair, _ in self._readable()):
            return False
        self._take(now)
        return True

    def now(self) -> list[Hashable]:
        """What the pairs hold at present, in tokens."""
        return self._look().tokens

    @property
    def complete(self) -> bool:
        """Whether everything could be looked into."""
        return self.contents.complete

    def _look(self) -> Contents:
        contents = self._contents_of()
        for space, name in self.pairs:
            contents.visit(space.get(name, _ABSENT))
        return contents.settle()

    def _take(self, contents: Contents) -> None:
        self.contents = contents
        self.sizes = list(map(len, self.classes))

    # --- collecting -------------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> None:
        layer = package_of(type(module)) == "torch"  # the engine reads its settings
        self._spaces[id(module)] = _Space(module.__dict__, layer)
        self._class(type(module))

    def _unregistered(self, module: nn.Module) -> None:
        """One in a plain list, say: `Watch` and `structure` do not know of it."""
        self._module(module)
        for name in ("training", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            self._add((id(module), name), module.__dict__)

    def _class(self, kind: type) -> None:
        """The classes whose attributes an instance of `kind` has."""
        for base in kind.__mro__:
            if base not in (object, nn.Module) and id(base) not in self._spaces:
                self._spaces[id(base)] = _Space(base.__dict__, False)

    def _follow(self) -> None:
        """Add pairs until the code that they lead to has no name that is new."""
        found = -1
        while found != len(self._pairs):
            found = len(self._pairs)
            for pair, space in list(self._readable()):
                self._add(pair, space)
            for function in list(self._seen.functions):
                self._function(function)
            for value in self._seen.objects:
                self._class(type(value))
            for kind in self._seen.classes:
                if package_of(kind) not in _OTHERS:
                    self._class(kind)
            for held in self._seen.modules:
                for module in held.modules():
                    if id(module) not in self._spaces:
                        self._unregistered(module)

    def _add(self, pair: tuple[int, str], space: Namespace) -> None:
        if pair not in self._pairs:
            self._pairs[pair] = space
            self._seen.visit(space[pair[1]])

    def _readable(self) -> Iterator[tuple[tuple[int, str], Namespace]]:
        for key, (space, every) in list(self._spaces.items()):
            for name in list(space):
                named = every or name in self._names or (self._computed and not name.startswith("__"))
                if named and name not in _INTERNAL:
                    yield (key, name), space

    def _function(self, function: types.FunctionType) -> None:
        package = package_of(function)
        layer = (function.__module__ or "").startswith("torch.nn.modules")  # a layer's forward, for its subclasses
        if package in _OTHERS and not layer:
            return
        self.foreign |= not layer
        for code in _nested(function.__code__):
            if code in self.codes:
                continue
            self.codes.add(code)
            self._names.update(code.co_names)
            if not layer:
                self._computed |= not _COMPUTED.isdisjoint(code.co_names)
                self._globals(function.__globals__, _free(code), code.co_names)

    def _globals(self, space: Namespace, names: Iterable[str], attributes: tuple[str, ...]) -> None:
        """The globals of a function, and what it may take from the Python modules among them."""
        for name in names:
            if name in space and (id(space), name) not in self._pairs:
                self._add((id(space), name), space)
                if isinstance(space[name], types.ModuleType):
                    self._globals(vars(space[name]), attributes, attributes)


def _free(code: types.CodeType) -> set[str]:
    """The names that code takes from its globals: a script's `mean = 0.1` is not what `x.mean()` reads."""
    return {at.argval for at in dis.get_instructions(code) if at.opname in _FREE}


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
