"""Which implementation of an op runs: explicit argument > `MTML_BACKEND` > automatic.

Every op owns one `Registry`. A backend that was asked for by name and cannot run raises; only the automatic choice
may fall through to the plain PyTorch reference, and it says so once.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from mtml_kernels.errors import BackendUnavailable, FallbackWarning

__all__ = [
    "AUTO",
    "CONTRACT_NAMES",
    "ENV",
    "REFERENCE",
    "VARIANT",
    "Backend",
    "Registry",
    "ShapeAndType",
    "imported",
    "without_autocast",
]

ENV = "MTML_BACKEND"
AUTO = "auto"
REFERENCE = "reference"
VARIANT = ":"  # between a backend's name and one of the ways in which it can be asked to work
# Names of the public contract. One that an op does not have is unavailable there; any other name is a typing error.
CONTRACT_NAMES = frozenset({REFERENCE, "cpu", "torch", "triton", "cuda"})

# os.environ.get raises an error and catches it where the name is missing, as it mostly is: 5 us of a small call's 100.
# Its dictionary, where Python has it, says so at once.
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = ENV if _VARIABLES is os.environ else os.environ.encodekey(ENV)

ShapeAndType = tuple[tuple[int, ...], torch.dtype]
T = TypeVar("T")


def imported(module: str, name: str) -> Callable[..., Any]:
    """`module.name`, imported when it is first called: a backend may be announced where its package is not loaded."""

    @functools.cache
    def found() -> Any:
        return getattr(importlib.import_module(module), name)

    return lambda *args: found()(*args)


def without_autocast(function: Callable[..., T]) -> Callable[..., T]:
    """The function with autocast off, on all devices: what is made of PyTorch's operations is computed as it stands."""
    if hasattr(function, "plain"):  # it is one already
        return function

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **options)
        with torch._C._DisableAutocast():
            return function(*args, **options)

    run.plain = function  # type: ignore[attr-defined]
    return run


def _supports_everything(device_type: str, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of one op.

    `forward` and `backward` take the op's arguments (the op's module gives the exact signatures). `available()` and
    `supports(device_type, dtype)` return None, or the reason why not.
    `carry_shapes(forward arguments)` gives (shape, dtype) of every tensor that `forward` leaves for `backward`; it is
    called with fake tensors and symbolic sizes, so it may only do arithmetic on sizes.
    `hand_out` (multi-head losses): as `backward`, but the gradients that `forward` gave are written over and handed
    out. A backend has it whose tensors lie on a device, where a look at the cotangents would wait for all its work.
    `fast_lane` (multi-head losses, inner loop): a way for small calls that looks at the tensors itself (`FastLane` in
    the schema).
    """

    name: str
    available: Callable[[], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[[str, torch.dtype], str | None] = _supports_everything
    carry_shapes: Callable[..., list[ShapeAndType]] | None = None
    hand_out: Callable[..., Any] | None = None
    fast_lane: Any = None

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """None where this backend can run tensors of that kind, else the reason."""
        return self.available() or self.supports(device_type, dtype)


class Registry:
    """The backends of one op, in the order in which the automatic choice tries them (the reference comes last)."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._backends: dict[str, Backend] = {}
        self._resolved: dict[tuple[str, str, torch.dtype], Backend] = {}
        self._warned: set[str] = set()

    def register(self, backend: Backend) -> None:
        """Adds a backend, or replaces the one of that name.

        All but the compiled ones run with autocast off, in both directions: a backward pass is surrounded by whatever
        surrounds `loss.backward()`, which would change products on the way back alone.
        """
        if not backend.name.startswith("cpu"):
            ways = (without_autocast(backend.forward), without_autocast(backend.backward))
            if ways != (backend.forward, backend.backward):
                backend = replace(backend, forward=ways[0], backward=ways[1])
        self._backends[backend.name] = backend
        self._resolved.clear()

    def unregister(self, name: str) -> None:
        """Forgets a backend (nothing happens where there is none of that name)."""
        self._backends.pop(name, None)
        self._resolved.clear()

    def names(self) -> list[str]:
        """All registered names, available or not; less variants (`"cpu:weights"`), which are found by name only."""
        return [name for name in self._backends if VARIANT not in name]

    def available(self) -> list[str]:
        """The names that can run on this machine."""
        return [name for name in self.names() if self._backends[name].available() is None]

    def status(self) -> dict[str, str | None]:
        """For every backend None (available) or the reason why it is not; for `mtml doctor`."""
        return {name: self._backends[name].available() for name in self.names()}

    def named(self, name: str) -> Backend:
        """The backend of that name, without asking whether it can run (the hot path of the op itself)."""
        try:
            return self._backends[name]
        except KeyError:
            raise self._unknown(name) from None

    def resolve(self, requested: str | None, device_type: str, dtype: torch.dtype) -> Backend:
        """The backend to run tensors of this kind on.

        Raises:
            ValueError: `requested` (or MTML_BACKEND) is not the name of any backend.
            BackendUnavailable: it names a backend that cannot run here, or cannot run this device or dtype.
        """
        name = requested or AUTO
        if name == AUTO and _KEY in _VARIABLES:
            name = os.environ.get(ENV) or AUTO
        key = (name, device_type, dtype)
        backend = self._resolved.get(key)
        if backend is None:
            choose = self._automatic if name == AUTO else self._explicit
            backend = self._resolved[key] = choose(*key)
        return backend

    def _explicit(self, name: str, device_type: str, dtype: torch.dtype) -> Backend:
        backend = self.named(name)
        reason = backend.refusal(device_type, dtype)
        if reason is not None:
            raise BackendUnavailable(f"{self.op}: backend {name!r} cannot run here: {reason}. {self._menu()}")
        return backend

    def instead(self, requested: str | None, name: str, why: str) -> str:
        """What runs where the backend that was resolved has no place for a call: the reference, with a warning.

        Raises:
            BackendUnavailable: it was asked for by name.
        """
        if (requested or AUTO) != AUTO or os.environ.get(ENV):
            raise BackendUnavailable(f"{self.op}: backend {name!r} cannot run this: {why}. {self._menu()}")
        self._warn_slow(f"{name}: {why}")
        return REFERENCE

    def _automatic(self, _: str, device_type: str, dtype: torch.dtype) -> Backend:
        refusals: list[str] = []
        for name in self.names():
            if name == REFERENCE:
                continue
            backend = self._backends[name]
            reason = backend.refusal(device_type, dtype)
            if reason is None:
                return backend
            refusals.append(f"{name}: {reason}")
        self._warn_slow("; ".join(refusals) or "no other backend is registered")
        return self.named(REFERENCE)

    def _warn_slow(self, why: str) -> None:
        if why in self._warned:
            return
        self._warned.add(why)
        message = (
            f"{self.op} runs on the plain PyTorch reference, which is slow ({why}). "
            f"Pass backend='reference' or set {ENV}=reference to choose it silently."
        )
        warnings.warn(message, FallbackWarning, stacklevel=2)

    def _unknown(self, name: str) -> Exception:
        if name in CONTRACT_NAMES:
            return BackendUnavailable(f"{self.op} has no {name!r} backend in this build. {self._menu()}")
        return ValueError(
            f"{self.op}: unknown backend {name!r} (from the argument backend= or the variable {ENV}). {self._menu()}"
        )

    def _menu(self) -> str:
        lines = [f"{name!r}" + (f" (not here: {why})" if why else "") for name, why in self.status().items()]
        return f"There is: 'auto', {', '.join(lines)}."
