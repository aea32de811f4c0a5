"""Work that the caller's context must not colour: in a thread of its own, one at a time.

Autocast, gradient and inference modes, hooks on saved tensors, torch.func's transforms, dispatch and function modes (a
default device, FakeTensorMode, make_fx's), forward-mode tangents and torch.compile's frame evaluation all belong to the
thread that set them. A new thread has none, whatever later releases add; contextvars, which are the user's, it keeps.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._guards import TracingContext, tracing
from torch.autograd import forward_ad

__all__ = ["exclusive", "hooked", "neutral", "uncompiled", "unhooked"]

T = TypeVar("T")
_LOCK = threading.Lock()
_INSIDE: Any = types.SimpleNamespace(in_kernel_invocation=True, shape_env=None)
_HELD = threading.local()  # .lock: by this thread, or by one that waits for it


@contextmanager
def exclusive() -> Iterator[None]:
    """Within it no other thread is within it, but those that `neutral` started from here."""
    if getattr(_HELD, "lock", False):
        yield
        return
    with _LOCK:
        _HELD.lock = True
        try:
            yield
        finally:
            _HELD.lock = False


def neutral(function: Callable[[], T]) -> T:
    """function() with gradients on and in no other context at all; what it raises is raised here.

    Functions that torch.compile has wrapped run as they were written: nothing is compiled, and no guard notes the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    held, context = getattr(_HELD, "lock", False), contextvars.copy_context()

    def work() -> None:
        _HELD.lock = held
        try:
            # forward AD's level, unlike its switch, belongs to the process; inside a kernel torch.compile stands aside
            with forward_ad._set_fwd_grad_enabled(False), tracing(TracingContext(_INSIDE)):
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=context.run, args=(work,), name="mtml-neutral", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()
    return results.pop()


def uncompiled(function: Callable[..., T], *args: Any) -> T:
    """function(*args), of which torch.compile compiles nothing: it would spend seconds on what runs once."""
    dynamo = sys.modules.get("torch._dynamo")  # importing it takes half a second
    return function(*args) if dynamo is None else dynamo.disable(function)(*args)


def hooked() -> bool:
    """Are there hooks on saved tensors, such as activation checkpointing's around the call?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextmanager
def unhooked() -> Iterator[None]:
    """Within it there are no hooks on saved tensors.

    Activation checkpointing counts what is saved under its hooks: nothing may be saved in the first run of a function
    that is not saved again in the second.
    """
    graph: Any = torch._C._autograd
    hooks = []
    while (pair := graph._top_saved_tensors_default_hooks(False)) is not None:
        graph._pop_saved_tensors_default_hooks()
        hooks.append(pair)
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            graph._push_saved_tensors_default_hooks(pack, unpack)
