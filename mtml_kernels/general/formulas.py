"""Within `formulas()`, operations whose second or higher derivatives PyTorch lacks or has wrong run as formulas.

They are replaced where Python calls them, in whatever code that happens: the model, a loss, an update rule, the
forward or backward of an autograd.Function. What C++ calls (TorchScript) is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from mtml_kernels.general.layers import FUNCTIONS, LAYERS
from mtml_kernels.general.norms import NORMS

__all__ = ["formulas"]

Formula = Callable[..., Any]

BY_NAME: dict[str, Formula] = NORMS | LAYERS
NAMESPACES = (torch._C._VariableFunctions, torch._C._nn)
TABLE: dict[Any, Formula] = {
    getattr(space, name): formula for name, formula in BY_NAME.items() for space in NAMESPACES if hasattr(space, name)
}
TABLE.update({getattr(F, name): formula for name, formula in FUNCTIONS.items() if hasattr(F, name)})

# PyTorch's functions in Python that call one of the table, or code of the user's that may
CALLERS: set[Any] = {
    F.batch_norm,
    F.hardsigmoid,
    F.instance_norm,
    F.layer_norm,
    F.multi_head_attention_forward,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.triplet_margin_with_distance_loss,
    torch.cdist,
    torch.autograd.grad,
    torch.autograd.backward,
    torch.Tensor.backward,
}
CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
PLAIN = (Tensor,)
_known: dict[Any, Formula | None] = {}  # by function, once it was met
_opened: dict[FunctionType, FunctionType] = {}


def _never(*_: Any) -> bool:
    return False


def _open(func: FunctionType) -> FunctionType:
    """The function without its own look for a mode, which would send every call back to the mode at once."""
    found = _opened.get(func)
    if found is None:
        names = func.__globals__ | dict.fromkeys((n for n in CHECKS if n in func.__globals__), _never)
        found = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        found.__kwdefaults__ = func.__kwdefaults__
        _opened[func] = found
    return found


class _Formulas(DeviceContext):
    """A mode for one thread. Activation checkpointing enters the `DeviceContext` of a forward again when it repeats the
    forward in the backward, and no other mode: so this is one, without a device.
    """

    def __init__(self) -> None:
        TorchFunctionMode.__init__(self)
        self._busy: list[Any] = []

    def __enter__(self) -> Any:
        return TorchFunctionMode.__enter__(self)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and types != PLAIN and not all(t is Tensor for t in types):  # a tensor subclass looks after itself
            return func(*args, **(kwargs or {}))
        try:
            formula = _known[func]
        except KeyError:
            formula = _known[func] = _formula_of(func)
        if formula is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if formula is _open:
            return self._within(func, args, kwargs or {})
        return formula(*args, **(kwargs or {}))

    def _within(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """The function with this mode in force for what it calls."""
        if func in self._busy:  # it looks for modes in a way of its own
            return func(*args, **kwargs)
        self._busy.append(func)
        try:
            with self:
                return _open(func)(*args, **kwargs)
        finally:
            self._busy.remove(func)


def _formula_of(func: Any) -> Formula | None:
    """What runs in place of a function: `_open` where the mode must stay in force within it, None for itself."""
    if func in TABLE:
        return TABLE[func]
    if isinstance(func, FunctionType):
        return _open if func in CALLERS or not func.__module__.startswith("torch.") else None
    if isinstance(func, OpOverload | OpOverloadPacket):
        namespace, _, name = str(func).partition(".")
        return BY_NAME.get(name.partition(".")[0]) if namespace == "aten" else None
    return None


def formulas() -> TorchFunctionMode:
    """A context in which every operation of the table is differentiable at will; for one thread and one use."""
    return _Formulas()
