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
from collections.abc import Hashable
from typing import TYPE_CHECKING, cast

import torch

from mtml.paths.batch import Batch, check_parts
from mtml.paths.path import Path
from mtml.paths.stand_in import Description, describe, stand_in
from mtml_kernels.checks import check_flag, check_steps
from mtml_kernels.transforms import is_forward_mode

if TYPE_CHECKING:
    from mtml.paths.cache import PathCache, Watch

__all__ = ["Traces", "traced_path"]

CALL = "call_"
_counter = itertools.count()
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
        from mtml.paths.traced_call import TracedCall, refuse_changes

        cache = self.cache()
        assert cache is not None
        if torch._C._are_functorch_transforms_active() or is_forward_mode():
            return self._transformed(cache, (steps, first_order, keep))
        batch = stand_in(description, steps)
        check_parts(batch.sx, batch.sy, batch.qx, batch.qy, keep != 0, cache.owner)
        call = TracedCall(cache, batch, (steps, first_order, keep))
        assert cache.now is not None
        refuse_changes(cast("Watch", cache.now.watch))
        key = description, call.options, call.modes, call.form
        name = self.names.setdefault(key, f"{CALL}{len(self.names)}")
        known = self.calls.__dict__.setdefault(name, call)
        known.path = call.path
        return name

    def _transformed(self, cache: PathCache, options: tuple[int, bool, int]) -> str:
        """The name of a call in a transform, where nothing can stand in for its batch."""
        from mtml.paths.traced_call import Uncompiled

        why, way_out = "it is inside a transform of torch.func (grad, vmap, ...)", "the transform outside torch.compile"
        name = f"{CALL}transformed_{len(vars(self.calls))}"
        setattr(self.calls, name, types.SimpleNamespace(path=Uncompiled(cache, options, why, way_out)))
        return name


def traced_path(cache: PathCache, batch: Batch, steps: int, first_order: bool, keep: int, quiet: bool = False) -> Path:
    """The path of a call that is being traced, which warns of nothing; all but `_named` is traced.

    Raises what an eager call raises, where there is no graph around it.
    """
    traces = cache.traces
    options = operator.index(check_steps(steps)), check_flag("first_order", first_order), keep
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
