"""Calls in a function that torch.compile compiles: the path is found while it traces, and again before every run.

Were `PathCache.find` traced as it stands, each of the thousand names that a `Watch` compares would become a guard. What
is traced instead is the path alone. The code of eager calls finds it, for a stand-in of the batch; and the graph has a
guard of its own, which does what an eager call does first: it looks whether the path still holds, and finds another
where it does not. Paths of one form make one graph, whose inputs are their tensors: another rate, or other parameters
in the place of these, need no compilation.
"""

from __future__ import annotations

import itertools
import operator
import types
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase

from mtml.paths.batch import Batch
from mtml.paths.finder import GENERAL
from mtml.paths.form import form_of
from mtml.paths.path import Outcome, Path
from mtml.paths.stand_in import Description, describe, stand_in
from mtml_kernels.checks import check_steps
from mtml_kernels.transforms import is_forward_mode

if TYPE_CHECKING:
    from mtml.paths.cache import PathCache, Watch

__all__ = ["Traces", "traced_path"]

CALL = "call_"
FUSED_ONLY = "a model of fused layers (MAML.explain says which are not), or torch.compile without fullgraph=True"
_counter = itertools.count(1)
_traces: weakref.WeakValueDictionary[str, Traces] = weakref.WeakValueDictionary()


class Traces:
    """The calls of one `PathCache` that graphs were made of. Graphs know them by their names."""

    def __init__(self, cache: PathCache) -> None:
        self.cache = weakref.ref(cache)
        self.calls = types.SimpleNamespace()
        self.names: dict[Hashable, str] = {}
        self.name = f"traces_{next(_counter)}"
        _traces[self.name] = self

    def named(self, description: Description, steps: int, first_order: bool, keep: int) -> str:
        """The name of such a call with the path that it has now."""
        cache = self.cache()
        assert cache is not None
        if torch._C._are_functorch_transforms_active() or is_forward_mode():
            return self._transformed(cache, (steps, first_order, keep))
        call = TracedCall(cache, stand_in(description, steps), (steps, first_order, keep))
        assert cache.now is not None
        _refuse_changes(cast("Watch", cache.now.fresh))
        key = description, call.options, call.modes, call.form
        name = self.names.setdefault(key, f"{CALL}{len(self.names)}")
        known = self.calls.__dict__.setdefault(name, call)
        known.path = call.path
        return name

    def _transformed(self, cache: PathCache, options: tuple[int, bool, int]) -> str:
        """The name of a call in a transform, where nothing can stand in for its batch."""
        why, way_out = "it is inside a transform of torch.func (grad, vmap, ...)", "the transform outside torch.compile"
        name = f"{CALL}transformed_{len(vars(self.calls))}"
        setattr(self.calls, name, types.SimpleNamespace(path=Uncompiled(cache, options, why, way_out)))
        return name


class Modes(NamedTuple):
    """What a path depends on beside its model and batch. autocast: what is cast to, None where it is off."""

    grad: bool
    device_type: str
    autocast: torch.dtype | None

    @staticmethod
    def now(device_type: str) -> Modes:
        """As they are."""
        on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        return Modes(torch.is_grad_enabled(), device_type, torch.get_autocast_dtype(device_type) if on else None)

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
    return [0 if call.holds() else next(_counter)]


register_opaque_type(TracedCall, typ="reference", guard_fn=_guarded, members={"path": MemberType.INLINED})


def _refuse_changes(watch: Watch) -> None:
    """Raise where the function that is traced changes before this call what the path was found by: a change happens
    when the graph runs, and the path is found before.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

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


def traced_path(cache: PathCache, batch: Batch, steps: int, first_order: bool, keep: int) -> Path:
    """The path of a call that is being traced; all but `_named` is traced.

    Raises what an eager call raises, where there is no graph around it.
    """
    traces = cache.traces
    options = operator.index(check_steps(steps)), bool(first_order), keep
    name = _named(traces.name, describe(batch), *options)
    if not name.startswith(CALL):
        exact = _named(traces.name, describe(batch, every=True), *options)  # whose numbers are the batch's
        raise RuntimeError(name if exact.startswith(CALL) else exact)
    path: Path = getattr(traces.calls, name).path
    return path


def _named(traces: str, description: Description, steps: int, first_order: bool, keep: int) -> str:
    """The name of the call, or what is wrong with it."""
    try:
        return _traces[traces].named(description, steps, first_order, keep)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# What torch.compiler.assume_constant_result does, less its import of torch._dynamo (half a second).
_named._dynamo_marked_constant = True  # type: ignore[attr-defined]
