"""A copy of a module that shares nothing with it that its forward could change.

Unlike copy.deepcopy it takes any tensors (results of operations, wrappers of torch.func's transforms, fakes), knows
methods and closures, and shares what has no copy: locks, files, threads, running generators, datasets. Classes and
Python's modules, with whatever they hold, are shared as well.
"""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable
from copy import copy as shallow_copy
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import DataLoader, Dataset

from mtml_kernels.recurrent import relink

__all__ = ["PrivateCopy"]

_SHARED: tuple[type, ...] = (
    type(None), bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.jit.ScriptModule, torch.jit.ScriptFunction, Dataset, DataLoader,
)  # fmt: skip
_PLAIN = frozenset(_SHARED)
_OWN_WAYS = ("__deepcopy__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")


class PrivateCopy:
    """`module` is the copy, `modules` are all modules in it, registered or not.

    Tensors that have no values of their own here (on the meta device, fake, wrapped by a transform of torch.func, with
    freed storage) are replaced by random ones.

    Args:
        model: the module to copy; it is only read.
        dtype: of the copies of its floating-point parameters and buffers; None: as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.modules: list[nn.Module] = []
        self._dtype, self._random = dtype, torch.Generator().manual_seed(0)
        self._copies: dict[int, Any] = {}  # by the id of the original
        self._pairs: list[tuple[Any, Any]] = []  # (copy, original): held, so that no id is given away
        self._pending: list[tuple[nn.Module, nn.Module]] = []
        self.module = self._module(model)
        while self._pending:  # attributes come after all registered tensors, which they may hold as well
            self._attributes(*self._pending.pop())

    def originals(self) -> dict[int, Any]:
        """What each copied part, given by its id, was made from. Whatever else the copy holds is shared."""
        return {id(copy): original for copy, original in self._pairs}

    def keep(self, original: Any, copy: Any) -> Any:
        """Remember the copy, before its parts are copied: they may hold it."""
        self._copies[id(original)] = copy
        self._pairs.append((copy, original))
        return copy

    def get(self, original: Any) -> Any:
        """The copy that there is already, or None."""
        return self._copies.get(id(original))

    # --- modules and tensors ------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._copies:
            return cast(nn.Module, self._copies[id(module)])
        if isinstance(module, torch.jit.ScriptModule):
            return module
        copy: nn.Module = self.keep(module, object.__new__(type(module)))
        self.modules.append(copy)
        self._pending.append((module, copy))
        inner = copy.__dict__
        for table in ("_parameters", "_buffers"):
            held = module.__dict__[table].items()
            inner[table] = {k: None if t is None else self._registered(t, table == "_parameters") for k, t in held}
        inner["_modules"] = {k: None if m is None else self._module(m) for k, m in module._modules.items()}
        return copy

    def _attributes(self, module: nn.Module, copy: nn.Module) -> None:
        inner = copy.__dict__
        for name, value in list(module.__dict__.items()):
            if name.endswith("_hooks"):
                inner[name] = shallow_copy(value)
            elif name not in ("_parameters", "_buffers", "_modules", "_compiled_call_impl"):
                inner[name] = self._attempt(value)
        relink(copy)

    def _registered(self, tensor: Tensor, parameter: bool) -> Tensor:
        if id(tensor) not in self._copies:
            values = self._values(tensor, parameter, self._dtype if tensor.is_floating_point() else None)
            self.keep(tensor, values)
        return cast(Tensor, self._copies[id(tensor)])

    def _values(self, tensor: Tensor, parameter: bool, dtype: torch.dtype | None = None) -> Tensor:
        if _has_values(tensor):
            values = tensor.detach().to(dtype or tensor.dtype, copy=True)
        else:
            values = torch.randn([int(size) for size in tensor.shape], generator=self._random)
            values = (values if parameter else values.abs()).to(dtype or tensor.dtype)  # a buffer may be a variance
            if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
                values = values.to(tensor.device)
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    # --- whatever else a module may hold ------------------------------------------------------------------------------

    def _attempt(self, value: Any) -> Any:
        """Its copy; the value itself, where some part of it fails to be copied."""
        mark = len(self._copies)
        try:
            return self.of(value)
        except Exception:  # of the user's classes, or too deep a structure: sharing is what is left
            self.forget(mark)
            return value

    def forget(self, mark: int) -> None:
        """Drop the copies made since there were `mark`: half of them may be unfinished."""
        while len(self._copies) > mark:
            self._copies.popitem()

    def mark(self) -> int:
        """For `forget`."""
        return len(self._copies)

    def of(self, value: Any) -> Any:
        """The copy of anything, or the value itself where that is shared."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, _SHARED):
            return self._module(value) if isinstance(value, nn.Module) else value
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self.keep(value, self._values(value, False))
        way = _WAYS.get(kind) or (_of_tuple if isinstance(value, tuple) else _of_object)
        return way(self, value)

    def many(self, values: Any) -> list[Any]:
        """The copies of several values."""
        return [value if type(value) in _PLAIN else self.of(value) for value in values]

    def deep(self, value: Any) -> Any:
        """As the classes of value and of its parts copy themselves."""
        copy = deepcopy(value, self._copies)
        self._pairs.append((copy, value))
        return copy


def _has_values(tensor: Tensor) -> bool:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return True  # its class looks after it
    return tensor.numel() == 0 or tensor._is_zerotensor() or tensor.untyped_storage().size() > 0


def _of_list(copier: PrivateCopy, value: list[Any]) -> Any:
    copy = copier.keep(value, [])
    copy.extend(copier.many(value))
    return copy


def _of_dict(copier: PrivateCopy, value: dict[Any, Any]) -> Any:
    copy = copier.keep(value, type(value)())
    if isinstance(value, collections.defaultdict):
        copy.default_factory = copier.of(value.default_factory)
    copy.update(zip(copier.many(value.keys()), copier.many(value.values()), strict=True))
    return copy


def _of_set(copier: PrivateCopy, value: Any) -> Any:
    return copier.keep(value, type(value)(copier.many(value)))


def _of_deque(copier: PrivateCopy, value: collections.deque[Any]) -> Any:
    copy = copier.keep(value, collections.deque(maxlen=value.maxlen))
    copy.extend(copier.many(value))
    return copy


def _of_tuple(copier: PrivateCopy, value: tuple[Any, ...]) -> Any:
    """Of named tuples as well."""
    items = copier.many(value)
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    found = copier.get(value)  # it may hold what holds it
    return found if found is not None else copier.keep(value, tuple.__new__(type(value), items))


def _of_method(copier: PrivateCopy, value: types.MethodType) -> Any:
    owner = copier.of(value.__self__)
    return value if owner is value.__self__ else copier.keep(value, types.MethodType(value.__func__, owner))


def _of_partial(copier: PrivateCopy, value: functools.partial[Any]) -> Any:
    function, args, kwargs = copier.many((value.func, value.args, value.keywords))
    return copier.keep(value, functools.partial(function, *args, **kwargs))


def _of_function(copier: PrivateCopy, value: Any) -> Any:
    """The function itself, unless it holds something that could change: then one that holds copies."""
    if _is_inert(value, set()):
        return value
    cells = value.__closure__ or ()
    own = tuple(copier.get(cell) or copier.keep(cell, types.CellType()) for cell in cells)
    copy = copier.keep(value, types.FunctionType(value.__code__, value.__globals__, value.__name__, closure=own))
    copy.__dict__.update(value.__dict__)
    copy.__module__, copy.__qualname__ = value.__module__, value.__qualname__
    copy.__defaults__, copy.__kwdefaults__ = copier.many((value.__defaults__, value.__kwdefaults__))
    for cell, new in zip(cells, own, strict=True):
        if cell != types.CellType():  # that is an empty one, which cannot be asked for its content
            new.cell_contents = copier.of(cell.cell_contents)
    return copy


def _is_inert(value: Any, seen: set[int]) -> bool:
    """Is it a constant, or a function that holds nothing but such?"""
    if id(value) in seen or isinstance(value, _SHARED):
        return True
    if not isinstance(value, types.FunctionType):
        return isinstance(value, tuple) and all(_is_inert(item, seen) for item in value)
    seen.add(id(value))
    cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    held = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return all(_is_inert(item, seen) for item in held)


def _of_reference(copier: PrivateCopy, value: weakref.ReferenceType[Any]) -> Any:
    target = copier.get(value())
    return value if target is None else weakref.ref(target)


def _of_generator(copier: PrivateCopy, value: torch.Generator) -> Any:
    return copier.keep(value, value.clone_state())


def _of_object(copier: PrivateCopy, value: Any) -> Any:
    """Attribute by attribute, where its class leaves copying to Python; else as the class says; else itself."""
    kind: Any = type(value)
    if hasattr(kind, "__del__") or (isinstance(kind.__new__, types.FunctionType) and not hasattr(kind, "__deepcopy__")):
        return value  # a copy could close what the object holds open, or be the object itself
    mark = copier.mark()
    try:
        if not _is_plain(kind):
            return copier.deep(value)
        state = value.__reduce_ex__(4)[2]
    except Exception:  # "cannot pickle '_thread.lock' object", or an error of the class
        copier.forget(mark)
        return value
    copy = copier.keep(value, kind.__new__(kind))
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    for name, item in (attributes or {}).items():
        copy.__dict__[name] = copier.of(item)
    for name, item in (slots or {}).items():
        object.__setattr__(copy, name, copier.of(item))
    return copy


def _is_plain(kind: type) -> bool:
    """Are its instances nothing but their attributes, as far as Python can tell?"""
    if kind is types.SimpleNamespace:
        return True
    for name in ("__new__", "__reduce_ex__", "__reduce__", "__getstate__"):
        if getattr(kind, name) is not getattr(object, name):
            return False
    return not any(hasattr(kind, name) for name in _OWN_WAYS)


_WAYS: dict[type, Callable[[PrivateCopy, Any], Any]] = {
    list: _of_list,
    dict: _of_dict,
    collections.OrderedDict: _of_dict,
    collections.defaultdict: _of_dict,
    set: _of_set,
    frozenset: _of_set,
    collections.deque: _of_deque,
    tuple: _of_tuple,
    types.MethodType: _of_method,
    types.FunctionType: _of_function,
    functools.partial: _of_partial,
    weakref.ReferenceType: _of_reference,
    torch.Generator: _of_generator,
}
