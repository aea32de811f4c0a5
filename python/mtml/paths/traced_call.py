"""A call that a graph of torch.compile was made of: its path as it is now, and whether it still holds.

Dynamo evaluates a guard of our own by way of opaque objects: the guard function of their type is called before every
run of a graph that reads one. This module is imported when something is traced, for what it needs of PyTorch is young.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase

from mtml.paths.batch import Batch
from mtml.paths.finder import GENERAL
from mtml.paths.form import form_of
from mtml.paths.path import Outcome, Path
from mtml_kernels.precision import autocast_dtype

if TYPE_CHECKING:
    from mtml.paths.cache import PathCache, Watch

__all__ = ["Modes", "TracedCall", "Uncompiled", "refuse_changes"]

FUSED_ONLY = "a model of fused layers (MAML.explain says which are not), or torch.compile without fullgraph=True"
_never = itertools.count(1)


class Modes(NamedTuple):
    """What a path depends on beside its model and batch. autocast: what is cast to, None where it is off."""

    grad: bool
    device_type: str
    autocast: torch.dtype | None

    @staticmethod
    def now(device_type: str) -> Modes:
        """As they are."""
        return Modes(torch.is_grad_enabled(), device_type, autocast_dtype(device_type))

    @contextmanager
    def entered(self, now: Modes) -> Iterator[None]:
        """Within it they are these; `now`: what they are around it."""
        casts = self.autocast is not None
        cast = torch.autocast(self.device_type, self.autocast if casts else now.autocast, enabled=casts)
        with torch.set_grad_enabled(self.grad), nullcontext() if now.autocast == self.autocast else cast:
            yield


class TracedCall(OpaqueBase):
    """A call, what finds its path, and the path as it is now: a graph's own guard."""

    def __init__(self, cache: PathCache, batch: Batch, options: tuple[int, bool, int]) -> None:
        self.cache, self.batch, self.options = weakref.ref(cache), batch, options
        self.path: Path | Uncompiled = self._found(cache)
        assert cache.now is not None
        self.modes = Modes.now(cache.now.device_type)
        self.first, self.form = self.path, form_of(self.path)  # a form is one while what it is of is held

    def find(self, cache: PathCache) -> Path | Uncompiled:
        """The path as it is now, in the modes of the place that the call has in the graph."""
        now = Modes.now(self.modes.device_type)
        if now == self.modes:
            return self._found(cache)
        with self.modes.entered(now):
            return self._found(cache)

    def _found(self, cache: PathCache) -> Path | Uncompiled:
        path = cache.find(self.batch, *self.options, quiet=True)
        if path.kind != GENERAL:
            return path
        last = getattr(self, "path", None)
        if isinstance(last, Uncompiled):
            return last
        return Uncompiled(cache, self.options, "backend='general'" if path.notice is None else path.notice[1])

    def holds(self) -> bool:
        """Whether a graph of the path is one of the path as it is now, too."""
        cache = self.cache()
        if cache is None:
            return False
        path = self.find(cache)
        if path is not self.path and form_of(path) != self.form:
            return False
        self.path = path
        return True


class Uncompiled:
    """The general path, which no graph has: the call runs between two graphs, or is an error where one is asked for."""

    kind = GENERAL

    def __init__(self, cache: PathCache, options: tuple[int, bool, int], why: str, way_out: str = FUSED_ONLY) -> None:
        self.cache, self.options = weakref.ref(cache), options
        self.plan: Any = None  # of the path that ran
        reason = f"the call takes the general path, which torch.compile does not compile: {why}. Way out: {way_out}"
        self.run = torch._dynamo.disable(self._run, reason=reason)

    def __call__(self, batch: Batch) -> Outcome:
        return self.run(batch)

    def _run(self, batch: Batch) -> Outcome:
        cache = self.cache()
        assert cache is not None
        path = cache.find(batch, *self.options)
        self.plan = getattr(path, "plan", None)
        return path(batch)

    def shaped(self, output: Any) -> Any:
        """The output as the model gave it."""
        return output


def _guarded(call: TracedCall) -> list[int]:
    """What is compared with what it was when the graph was made: 0, or a number that never was."""
    return [0 if call.holds() else next(_never)]


register_opaque_type(TracedCall, typ="reference", guard_fn=_guarded, members={"path": MemberType.INLINED})


def refuse_changes(watch: Watch) -> None:
    """Raise where the function that is traced changes before this call what the path was found by: a change happens
    when the graph runs, and the path is found before.
    """
    effects: Any = InstructionTranslator.current_tx().output.side_effects
    for variable, changes in effects.store_attr_mutations.items():
        held = getattr(variable, "value", None)
        for name, new in changes.items():
            if watch.reads(held, name) and not _is(new, getattr(held, name, None)):
                raise RuntimeError(f"{name}: {_CHANGED} {type(held).__name__}{_BEFORE}")
    for container in watch.containers():
        variable = effects.id_to_variable.get(id(container))
        if variable is not None and effects.is_modified(variable):
            raise RuntimeError(f"model: {_CHANGED} {type(container).__name__} that it reads{_BEFORE}")


_CHANGED = "expected no change between the start of the compiled function and this call, got one of a"
_BEFORE = "; change it before the compiled function is called"


def _is(new: Any, value: Any) -> bool:
    """Whether what Dynamo is to store is the value that stands there."""
    try:
        return bool(new.as_python_constant() == value)
    except NotImplementedError:
        return getattr(new, "value", None) is value
