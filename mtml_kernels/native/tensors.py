"""Tensors on their way into the compiled engine and out of it.

The engine takes addresses; what a wrong address could break is checked here: dtype, contiguity, memory of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.checks import check_ids
from mtml_kernels.memory import LARGE, in_memory
from mtml_kernels.native import availability, engine

__all__ = [
    "address_of",
    "addresses_of",
    "call_tensors",
    "checked",
    "checked_inputs",
    "checked_one",
    "cotangent_address",
    "home_of",
    "plain_tensors",
    "read_call",
    "recycled",
    "recycled_like",
]

_LOW = 1 << 36  # views of a freed storage lie at their offset from null


@functools.cache
def plain_tensors() -> Any:
    """The engine's reader of tensors, None where there is no engine or PyTorch lets nobody read them this way."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None or availability() is not None:
        return None
    return engine().PlainTensors(table, Tensor, torch.nn.Parameter, torch.UntypedStorage)


@functools.cache
def _call_tensors() -> Any:
    """`plain_tensors` for tensors of any device."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None or availability() is not None:
        return None
    return engine().CallTensors(table, Tensor, torch.nn.Parameter, torch.UntypedStorage)


def call_tensors() -> Any:
    """The engine's reader of a call's tensors.

    Raises:
        RuntimeError: there is none.
    """
    found = _call_tensors()
    if found is None:
        raise RuntimeError("tensors cannot be read without Python here")
    return found


def read_call(*groups: Sequence[Tensor | None] | Tensor | None) -> tuple[bytes, bytes] | None:
    """Tensors, None and lists of such: their form, all that is to be known of them but where they lie, and that.

    None where one is not plain and contiguous, or nobody can read them this way. Equal forms are equal in shapes,
    dtypes, devices and in what requires grad.
    """
    reader = _call_tensors()
    found: tuple[bytes, bytes] | None = None if reader is None else reader.read(*groups)
    return found


def home_of(like: Tensor) -> Any:
    """Where tensors like this one lie, for a lane to make others there."""
    cuda, index, bits = like.device.type == "cuda", like.device.index or 0, like.dtype.itemsize * 8
    return engine().Home(
        tensors=call_tensors(), dtype=like.dtype, device=like.device, bits=bits, cuda=cuda, index=index
    )


# --- where checked tensors lie: 0 stands for None ---------------------------------------------------------------------


def address_of(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def cotangent_address(name: str, t: Tensor | None) -> int:
    """Where a contiguous cotangent lies. TypeError where it has no memory."""
    try:
        at = 0 if t is None else t.data_ptr()
    except RuntimeError:  # is_grads_batched=True
        at = 0
    if at < _LOW and t is not None:
        in_memory(name, t)
    return at


# --- the checks: tensors as the engine reads them, which must outlive the call, and where they lie --------------------


def checked(
    name: str | Callable[[int], str], tensors: Sequence[Tensor | None], dtype: torch.dtype, *, ids: bool = False
) -> tuple[Sequence[Any], list[int]]:
    """Mostly the very same tensors, and their addresses, 0 for None and for tensors without elements.

    `ids`: there may be class ids among them.

    Raises:
        TypeError: a tensor has another dtype, or no memory of its own; it names the tensor.
    """
    reader = plain_tensors()
    if reader is not None:
        floats = 0 if dtype is torch.int64 else dtype.itemsize * 8
        found: list[int] | None = reader.addresses(tensors, floats, ids or not floats)
        if found is not None:
            return tensors, found
    ready: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        at = name(i) if callable(name) else name if len(tensors) == 1 else f"{name}[{i}]"
        if t is not None and t.dtype is not dtype and not (ids and t.dtype is torch.int64):
            raise TypeError(f"{at}: expected {dtype}, got {t.dtype}. Convert it with .to({dtype})")
        ready.append(None if t is None else in_memory(at, t))
    return ready, addresses_of(ready)


def checked_one(name: str, t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """`checked` for one tensor."""
    if t is None:
        return None, 0
    (ready,), (at,) = checked(name, (t,), dtype)
    return ready, at


def checked_inputs(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype, ids: Sequence[int]
) -> tuple[Sequence[Any], list[int]]:
    """`checked` for the inputs of a model, of which those in `ids` are an embedding's ids, read as int64."""
    if not ids:
        return checked(name, tensors, dtype)
    ready: list[Any] = []
    for i, t in enumerate(tensors):
        at = name if len(tensors) == 1 else f"{name}[{i}]"
        if i in ids:
            check_ids(at, t)
            ready.append(in_memory(at, t).long())
        else:
            ready += checked(at, (t,), dtype)[0]
    return ready, addresses_of(ready)


# --- memory for results -----------------------------------------------------------------------------------------------


def recycled(elements: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [elements], which goes back to the engine's pool with its last view."""
    if elements * dtype.itemsize < LARGE:
        return torch.empty(elements, dtype=dtype, device="cpu")
    return torch.frombuffer(engine().Memory(elements * dtype.itemsize), dtype=dtype)


def recycled_like(t: Tensor) -> Tensor:
    """Uninitialised contiguous memory of a tensor's shape."""
    if t.numel() * t.dtype.itemsize < LARGE:
        return torch.empty(t.shape, dtype=t.dtype, device="cpu")
    return recycled(t.numel(), t.dtype).view(t.shape)
