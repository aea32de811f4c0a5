"""Which way a function's calls of one signature are run: found out on the first tasks of the first call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mtml.mapped.arguments import Arguments
from mtml.mapped.effects import State, effect, reach_of, unwatched
from mtml.mapped.explain import TaskMapExplanation
from mtml.mapped.fused import FusedLoop
from mtml.mapped.recognise import Unknown, recognised
from mtml.mapped.recording import Recording, noting
from mtml.mapped.trial import difference, perturbed, seconds
from mtml.mapped.ways import in_turn, of_task, stacked, vmapped
from mtml.paths.cache import Watch
from mtml.paths.contents import Contents, package_of
from mtml.paths.reach import Reach

__all__ = ["FEW", "Choice", "Decided", "decide"]

FEW = 3  # tasks that are tried

Function = Callable[..., Any]


class Choice(NamedTuple):
    """How calls are run, while `fresh()` says that what the function reads is as it was."""

    explanation: TaskMapExplanation
    fused: FusedLoop | None = None
    fresh: Callable[[], bool] | None = None

    @property
    def way(self) -> str:
        """Its name."""
        return self.explanation.way

    def holds(self, given: Arguments) -> bool:
        """Whether the choice is one for this call, whose signature fits."""
        return (self.fresh is None or self.fresh()) and (self.fused is None or self.fused.holds(given))


class Decided(NamedTuple):
    """A choice, and the results of the first tasks where the function must not run on them again."""

    choice: Choice
    done: Sequence[Any] = ()


def decide(fn: Function, given: Arguments, randomness: str, fuse: bool, settle: bool) -> Decided:
    """The way for calls like this one.

    Args:
        fuse: whether fusing is thought of. settle: the choice is for good, whatever the function reads.
    """
    objects = given.objects()
    whole = functools.partial(fn, *objects) if objects else fn  # what they do, the function does
    reach = reach_of(whole)
    before = State(reach, given.tensors())
    row = given.of_task(0)
    notes, noted = noting(fn)
    results = [of_task(noted, given, 0, row, randomness)]
    results = in_turn(fn, given, randomness, results, FEW)
    why = effect(reach)
    if why is None and before.changed():
        why = "a run of it changes what it reads or is given"
    if why is not None:
        return Decided(Choice(TaskMapExplanation("loop", f"{why}, so it runs for every task")), results)
    few, expected = given.first(len(results)), stacked(results)
    not_fused = "what it reads changes from call to call; pass that as an argument, or as a tensor changed in place"
    if fuse:
        found = _fused(fn, reach, notes, row, few, results)
        if isinstance(found, Choice):
            return Decided(found)
        not_fused = found
    words = _vmap_or_loop(fn, given, few, expected, randomness, not_fused)
    watched = reach_of(whole, functools.partial(Contents, versions=False))
    choice = Choice(words, fresh=None if settle else _watch(watched))
    return Decided(choice, results if choice.way == "loop" else ())


def _watch(reach: Reach) -> Watch:
    """Of all that is reached; of mtml's own modules, whose code is not followed, every attribute."""
    holder, options = nn.Module(), Contents(versions=False)
    ours = [module for module in reach.contents.modules if package_of(type(module)) == "mtml"]
    inner = [child for module in ours for child in module.children()]
    holder.module = nn.ModuleList([*(m for m in reach.contents.modules if m not in ours), *inner])
    holder.ours = nn.ModuleList(ours)
    for module in ours:
        for name in ("lr", "params", "update"):
            options.visit(getattr(module, name, None))
    return Watch(holder, [reach], options.settle())


# --- fused ------------------------------------------------------------------------------------------------------------


def _fused(
    fn: Function, reach: Reach, notes: Recording, row: list[Any], few: Arguments, results: Sequence[Any]
) -> Choice | str:
    """The choice of the engine, or why it is none."""
    why = few.unwatched() or unwatched(reach)
    if why is not None:
        return why
    one = perturbed(few.first(1))
    try:
        fused = FusedLoop(recognised(notes, results[0], reach.contents.modules), row, few, _tensors(reach))
        engine = fused.explain(few)
        if engine.path == "general":
            return "; ".join(engine.reasons) or engine.reason
        other = difference(stacked(results), fused(few)) or difference(stacked(in_turn(fn, one, "error")), fused(one))
    except Unknown as unknown:
        return str(unknown)
    except (ValueError, TypeError, RuntimeError) as error:  # what MAML does not take, and the function may
        return f"mtml.MAML does not take it: {error}"
    if other is not None:
        return f"it looks like {fused}, but {other}"
    words = TaskMapExplanation(
        "fused", f"all tasks in one call of the engine ({engine.kernel})", str(fused), engine=engine
    )
    watched = reach_of(fn, functools.partial(Contents, live=fused.live()))
    return Choice(words, fused, _watch(watched))


def _tensors(reach: Reach) -> set[int]:
    """The ids of all tensors that stand under names."""
    own = (t for module in reach.contents.modules for t in (*module.parameters(), *module.buffers()))
    return {id(value) for value in (*reach.contents.held, *own) if isinstance(value, Tensor)}


# --- vmap or loop -----------------------------------------------------------------------------------------------------


def _vmap_or_loop(
    fn: Function, given: Arguments, few: Arguments, expected: Any, randomness: str, not_fused: str
) -> TaskMapExplanation:
    if given.tasks == 1:
        return TaskMapExplanation("loop", "there is one task", not_fused=not_fused)
    try:
        found = vmapped(fn, few, randomness)
    except Exception as error:  # whatever vmap cannot do
        text = str(error).splitlines()[0][:200] if str(error) else ""
        why = f"{type(error).__name__}: {text}"
        hint = "; with torch.func.grad in place of torch.autograd.grad it can" if "not require grad" in why else ""
        return TaskMapExplanation("loop", f"torch.func.vmap cannot run it{hint}", not_fused=not_fused, not_vmap=why)
    other = difference(expected, found)
    if other is not None:
        return TaskMapExplanation("loop", f"under torch.func.vmap {other}", not_fused=not_fused, not_vmap=other)
    times = seconds(
        [lambda: vmapped(fn, given, randomness), lambda: stacked(in_turn(fn, few, randomness))],
    )
    times[1] *= given.tasks / few.tasks
    words = f"measured once for this signature: vmap {1e3 * times[0]:.2f} ms, loop {1e3 * times[1]:.2f} ms"
    way = "vmap" if times[0] < times[1] else "loop"
    return TaskMapExplanation(way, words, not_fused=not_fused)
