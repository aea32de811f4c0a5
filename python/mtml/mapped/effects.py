"""What a task's function does beside computing its result, judged by its code and by what a run of it changes.

Only a function of its arguments and of what stands under names may run once for all tasks, or not at all: what prints,
logs, counts, draws or reads the time has to run for every task.
"""

from __future__ import annotations

import builtins
import dis
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtml.paths.contents import Contents, package_of
from mtml.paths.reach import Reach

__all__ = ["State", "effect", "reach_of", "unwatched"]

_ACTS = {"print", "open", "input", "next", "exec", "eval", "breakpoint", "__import__", "globals"}
_PURE = {
    "abs", "all", "any", "bool", "callable", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset",
    "getattr", "hasattr", "int", "isinstance", "issubclass", "iter", "len", "list", "map", "max", "min", "object",
    "pow", "property", "range", "repr", "reversed", "round", "set", "slice", "sorted", "staticmethod", "str", "sum",
    "super", "tuple", "type", "zip",
}  # fmt: skip
_LIBRARIES = {"torch", "mtml", "mtml_kernels", "math", "operator", "functools", "collections", "typing", "builtins"}
_HARMLESS = _LIBRARIES | {"abc", "contextlib", "copy", "dataclasses", "enum", "itertools", "types"}  # their functions
_HELD = (
    Tensor, nn.Module, dict, types.MappingProxyType, list, tuple, set, frozenset, torch.Size, torch.dtype, torch.device,
)  # fmt: skip
_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
# What changes when it is used, and shows no trace of that.
_OPAQUE = (torch.Generator, torch.UntypedStorage, torch.TypedStorage, memoryview)
_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def reach_of(fn: Callable[..., Any], contents_of: Callable[[], Contents] = Contents) -> Reach:
    """What a function can read, by the names in its code."""
    holder = nn.Module()
    holder.__dict__["forward"] = fn
    return Reach(holder, contents_of=contents_of)


class State:
    """What a run may change: contents that can be reached, tensors of modules, arguments, PyTorch's random numbers.

    Tensors are compared with copies, since a write through ``.data`` leaves their version as it was, and so are
    gradients that ``backward`` adds to: as much memory as one inner step needs.
    """

    def __init__(self, reach: Reach, arguments: Sequence[Tensor]) -> None:
        self._reach = reach
        own = [t for module in reach.contents.modules for t in (*module.parameters(), *module.buffers())]
        held = [value for value in reach.contents.held if isinstance(value, Tensor)]
        self._tensors = list({id(t): t for t in (*own, *held, *arguments)}.values())
        self._seen = self._look()
        self._copies = [(t, t.detach().clone()) for t in self._with_gradients() if _plain(t)]

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        return self._look() != self._seen or not all(_as_it_was(t, copy) for t, copy in self._copies)

    def _with_gradients(self) -> list[Tensor]:
        return self._tensors + [t.grad for t in self._tensors if t.is_leaf and t.grad is not None]

    def _look(self) -> tuple[Any, ...]:
        versions = [0 if t.is_inference() else t._version for t in self._tensors]
        return self._reach.now(), versions, list(map(id, self._with_gradients())), torch.get_rng_state().tolist()


def _plain(t: Tensor) -> bool:
    """Whether its memory can be read; of others the version has to do."""
    return t.layout is torch.strided and not t.is_meta and not t.is_quantized


def _as_it_was(now: Tensor, before: Tensor) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    now = now.detach()
    return bool(((now == before) | ((now != now) & (before != before))).all())


def effect(reach: Reach) -> str | None:
    """What the code does that every task has to do; None where nothing shows."""
    for code in _own(reach):
        for at in dis.get_instructions(code):
            if at.opname in ("LOAD_GLOBAL", "LOAD_NAME") and at.argval in _ACTS:
                return f"it calls {at.argval}()"
            outer = at.opname in ("STORE_DEREF", "DELETE_DEREF") and at.argval in code.co_freevars
            if outer or at.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                return f"it changes {at.argval!r} outside itself"
    for value in reach.contents.held:
        if isinstance(value, _OPAQUE) or (hasattr(type(value), "__next__") and not isinstance(value, type)):
            return f"it reads {_name(value)}, which is another after every use"
        library, fine = _library(value), _HARMLESS if isinstance(value, _CODE) else _LIBRARIES
        if library == "numpy" or (library in sys.stdlib_module_names and library not in fine):
            return f"it uses {_name(value)} of {library}, which may act or differ from call to call"
    return None


def unwatched(reach: Reach) -> str | None:
    """Why the function has to run for a result where `effect` finds nothing, or None."""
    if not reach.complete:
        return "it reads more than can be watched"
    for code in _own(reach):
        for at in dis.get_instructions(code):
            if at.opname in ("STORE_ATTR", "DELETE_ATTR"):
                return f"it sets the attribute {at.argval!r}"
            if at.opname == "IMPORT_NAME":
                return f"it imports {at.argval} at every call"
            if at.opname in ("LOAD_GLOBAL", "LOAD_NAME") and hasattr(builtins, at.argval) and not _known(at.argval):
                return f"it calls {at.argval}()"
    for value in reach.contents.held:
        if not _watched(value):
            return f"it reads {_name(value)}, a {type(value).__name__}, which cannot be watched"
    return None


def _own(reach: Reach) -> Iterator[types.CodeType]:
    """Code of the user's: PyTorch's layers are followed for their names alone."""
    root = torch.__path__[0]
    return (code for code in reach.codes if not code.co_filename.startswith(root))


def _known(builtin: str) -> bool:
    return builtin in _PURE or builtin.endswith(("Error", "Exception"))


def _library(value: Any) -> str:
    """The top-level package of a function, class or Python module; of anything else that of its class."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0]
    if isinstance(value, _CODE):
        return package_of(value) or "builtins"
    return package_of(type(value))


def _watched(value: Any) -> bool:
    """Whether a change of the value would show, or none can be."""
    if isinstance(value, _HELD):
        return True
    if isinstance(value, _FUNCTIONS):
        return _library(value) in _HARMLESS or _library(value) == "_operator"
    if isinstance(value, types.FunctionType | types.ModuleType | type):
        return True  # of the user's: what it reads is followed; of the library's: it reads nothing of the user's
    return _library(value) not in ("torch", "builtins") or isinstance(
        value, types.MethodType | staticmethod | classmethod | property
    )


def _name(value: Any) -> str:
    return getattr(value, "__name__", "") or f"a {type(value).__name__}"
