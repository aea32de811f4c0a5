"""Schedules by the shapes of a call: made once, then found again."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from mtml_kernels.schedule.call import ABSENT, VIEWS, Part, Schedule
from mtml_kernels.schedule.grouping import grouped
from mtml_kernels.schedule.loop import Given, Loop, WayBack
from mtml_kernels.schedule.memory import stretches
from mtml_kernels.schema.inner_loop import KEEP_NONE, MOMENTS, InnerLoopArgs

__all__ = ["Plan", "Trip", "plan_of", "usual"]

MAX_PLANS = 256
_plans: dict[Hashable, Plan] = {}


def usual(a: InnerLoopArgs) -> Given:
    """The cotangents that a call's results mostly get: of the loss, else of the adapted parameters, else the output."""
    kept = len(a.spec.adapted) if a.spec.keep != KEEP_NONE else 0
    loss = a.has_loss
    adapted = tuple([not loss] * sum(a.spec.adapted)) if kept else ()
    extra = a.spec.rule.moments if a.spec.has(MOMENTS) else ()
    adapted += tuple([False] * (len(extra) * sum(a.spec.adapted)))
    return Given(loss, not loss and not kept and bool(a.query_x), False, adapted)


class Trip(NamedTuple):
    """The way there and back; `groups`: the planes of the gradients, as `InnerLoopArgs.groups` has them."""

    there: Schedule
    back: Schedule
    groups: list[list[int]]


@dataclasses.dataclass
class Plan:
    """The schedules of calls of these shapes: the way there, and a way back for every set of cotangents."""

    a: InnerLoopArgs
    there: Schedule
    usually: Given
    trips: dict[Given, Trip] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(a: InnerLoopArgs) -> Plan:
        """For calls like this one, of whose tensors only shapes and dtypes are looked at."""
        usually = usual(a)
        if not a.needs:
            return Plan(a, _there(a), usually)
        trip = _trip(a, usually)
        return Plan(a, trip.there, usually, {usually: trip})

    def trip(self, given: Given) -> Trip:
        """The way back from these cotangents, and the way there that leaves what it reads."""
        if given not in self.trips:
            self.trips[given] = _trip(self.a, given)
        return self.trips[given]


class Form(NamedTuple):
    """What a schedule knows of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(t: torch.Tensor) -> Form:
        """Sizes as numbers: symbolic ones (under torch.compile) are fixed to what they are."""
        return Form(torch.Size([int(n) for n in t.shape]), t.dtype)

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Whether its numbers are."""
        return self.dtype.is_floating_point


_LISTS = ("params", "lr", "support_x", "query_x", "hyper", "moments")
_SINGLE = ("support_y", "query_y", "support_mask", "query_mask", "step_weights")


def _bare(a: InnerLoopArgs) -> InnerLoopArgs:
    """The same call with the forms of its tensors in their place."""
    named: dict[str, Any] = {name: [Form.of(t) for t in getattr(a, name)] for name in _LISTS}
    for name in _SINGLE:
        tensor = getattr(a, name)
        named[name] = None if tensor is None else Form.of(tensor)
    return a._replace(**named)


def _there(a: InnerLoopArgs) -> Schedule:
    """The way there alone."""
    loop, results = _way_there(a)
    return _schedule(loop, loop.draft.parts, results, frozenset())


def _trip(a: InnerLoopArgs, given: Given) -> Trip:
    """With as many steps run again as memory asks for."""
    loop, results = _way_there(a)
    there, back, groups, kept = _way_back(loop, given, [])
    again = stretches(a.spec.steps, sum(loop.draft.planes[i].bytes for i in kept), _state_bytes(loop))
    if again:
        loop, results = _way_there(a)
        there, back, groups, kept = _way_back(loop, given, again)
    flat = [plane for group in groups for plane in group]
    return Trip(_schedule(loop, there, results, kept), _schedule(loop, back, flat, frozenset()), groups)


def _way_there(a: InnerLoopArgs) -> tuple[Loop, list[int]]:
    loop = Loop(a)
    results, kept = loop.forward()
    return loop, [*results, *kept]


def _state_bytes(loop: Loop) -> int:
    last = loop.spec.steps
    planes = [p for group in (loop.theta[last], *loop.moments[last]) for p in group if p != ABSENT]
    return sum(loop.draft.planes[p].bytes for p in planes if loop.draft.planes[p].source is None)


def _way_back(
    loop: Loop, given: Given, again: Sequence[range]
) -> tuple[list[tuple[str, Part]], list[tuple[str, Part]], list[list[int]], frozenset[int]]:
    """(parts there, parts back, gradients group by group, planes that go from there to back)."""
    there = list(loop.draft.parts)
    loop.draft.parts = []
    way = WayBack(loop, given)
    way.run(again)
    back = loop.draft.parts
    made = {plane for _, part in there for plane in part.writes if plane != ABSENT}
    read = {plane for _, part in back for plane in part.reads if plane in made}
    read |= {plane for group in way.results for plane in group if plane in made}
    return there, _views_of_kept(there, read) + back, way.results, frozenset(read & made)


def _views_of_kept(there: Sequence[tuple[str, Part]], read: set[int]) -> list[tuple[str, Part]]:
    """The parts there that only look at memory in another way: not kept, but looked at again. Changes `read`."""
    again = []
    for where, part in reversed(there):
        if part.kernel in VIEWS and part.writes[0] in read:
            read.discard(part.writes[0])
            read.update(part.reads)
            again.append((where, part))
    return again[::-1]


def _schedule(loop: Loop, parts: Sequence[tuple[str, Part]], results: Sequence[int], kept: frozenset[int]) -> Schedule:
    planes = tuple(loop.draft.planes)
    stays = kept | {plane for plane in results if plane != ABSENT}
    live = _needed(parts, stays)
    return Schedule(planes, grouped(live, planes, frozenset(stays)), tuple(results), tuple(sorted(kept)))


def _needed(parts: Sequence[tuple[str, Part]], wanted: frozenset[int] | set[int]) -> list[tuple[str, Part]]:
    """The parts on which what is wanted depends, with only those results that somebody reads."""
    read, found = set(wanted), []
    for where, part in reversed(parts):
        writes = tuple(plane if plane in read else ABSENT for plane in part.writes)
        if any(plane != ABSENT for plane in writes):
            read.update(plane for plane in part.reads if plane != ABSENT)
            found.append((where, dataclasses.replace(part, writes=writes)))
    return found[::-1]


def plan_of(a: InnerLoopArgs) -> Plan:
    """The plan for calls of these shapes and dtypes."""
    bare = _bare(a)
    lists, single = (tuple(map(tuple, (getattr(bare, n) for n in _LISTS))), tuple(getattr(bare, n) for n in _SINGLE))
    key = bare.spec.text, bare.needs, lists, single
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan.of(bare)
    return plan
