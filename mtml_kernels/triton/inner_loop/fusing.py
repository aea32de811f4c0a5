"""A schedule's calls as launches: which parts of a call one kernel does, and what is left to kernels of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from mtml_kernels.program.layers.window import Window
from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule
from mtml_kernels.schedule.kernels import KERNELS, Convolution, Linear, Loss
from mtml_kernels.triton.inner_loop.expressions import EXPRESSIONS
from mtml_kernels.triton.inner_loop.jobs import Job, Launch, Phase, Product, Reading, Space, Term
from mtml_kernels.triton.inner_loop.policy import pieces_of, tile_of
from mtml_kernels.triton.inner_loop.pool import POOLS, Panes, index_of, index_type
from mtml_kernels.triton.inner_loop.shares import FINISHES, makers, shared
from mtml_kernels.triton.inner_loop.waiting import Waiting

__all__ = ["Fused"]

MOST_JOBS = 12  # side by side: an epilogue of all parameters' updates is one each


class Fused:
    """A schedule's steps, each a launch or a part, and its planes with the ones between."""

    def __init__(self, schedule: Schedule) -> None:
        self.planes: list[Plane] = list(schedule.planes)
        self.root = list(range(len(self.planes)))  # of a view: the plane whose memory it is
        self._over_tasks: dict[int, int] = {}  # by result: the plane of shares that the part being read left
        self._waiting = Waiting(self.root)
        self.steps: list[tuple[Launch | Part, tuple[int, ...]]] = []  # with the planes that nobody reads after it
        for call in schedule.calls:
            self._narrow(call)
            steps = list(self._call(call, last=call is schedule.calls[-1]))
            own = [step.reads[:1] if isinstance(step, Part) and step.kernel in FINISHES else () for step in steps]
            ended = self._waiting.drops(call.drops, len(steps))
            own[-1:] = [drops + ended for drops in own[-1:]]
            self.steps += list(zip(steps, own, strict=True))

    def _narrow(self, call: Call) -> None:
        """Positions of maxima in fewer bits."""
        for part in call.parts:
            index = index_of(part)
            if index != ABSENT:
                self.planes[index] = dataclasses.replace(self.planes[index], dtype=index_type(part.constants))

    def _call(self, call: Call, last: bool) -> Iterator[Launch | Part]:
        """Two launches are open at a time: products, and what adds their shares up; see `_place`."""
        opened = [Launch([]), Launch([])]
        finishing: list[Part] = []
        for part in call.parts:
            in_pieces = self._waiting.reads_pieces(part)
            waits = in_pieces and self._pointwise(part)  # else what waits for the sums goes along with them
            ready = self._waiting.due(None if in_pieces and not waits else part)
            for one in ready if waits else [*ready, part]:
                yield from self._part(opened, finishing, one)
            if waits:
                self._waiting.takes(part)
        if last:
            for one in self._waiting.due(None):
                yield from self._part(opened, finishing, one)
            yield from self._put_together(opened, finishing)
        yield from self._closed(opened, finishing)

    def _part(self, opened: list[Launch], finishing: list[Part], part: Part) -> Iterator[Launch | Part]:
        """Into what is open, or after it."""
        if self._waiting.reads_pieces(part):
            yield from self._put_together(opened, finishing)
        if any(set(part.reads) & set(finish.writes) - {ABSENT} for finish in finishing):
            yield from self._closed(opened, finishing)
        if (finish := self._sharing(opened, part)) is not None:
            finishing.append(finish)
            return
        if self._judges(opened, part):
            return
        jobs = self._jobs(part)
        place = None if jobs is None else self._place(opened, part, jobs)
        if place is None and (jobs is not None or self._awaits(opened, part)):
            yield from self._closed(opened, finishing)
        if jobs is None:  # before what is open, where it waits for nothing of that
            yield part
            self._look_through(part)
            return
        self._add(opened[place or 0], part, jobs)
        opened[1].jobs += self._sums(part)

    def _awaits(self, opened: Sequence[Launch], part: Part) -> bool:
        """Whether it reads memory that an open launch writes."""
        written = {self.root[plane] for launch in opened for plane in launch.makes}
        return bool(written & {self.root[plane] for plane in part.reads if plane != ABSENT})

    def _closed(self, opened: list[Launch], finishing: list[Part]) -> Iterator[Launch | Part]:
        """What is open, which then is nothing."""
        yield from [launch for launch in opened if launch.jobs] + finishing
        opened[:], finishing[:] = [Launch([]), Launch([])], []

    def _sharing(self, opened: Sequence[Launch], part: Part) -> Part | None:
        """What puts a part's shares together, where the launch that makes its operands can store them."""
        found = shared(opened, part, self.planes)
        if found is None:
            return None
        self.planes.append(found.plane)
        self.root.append(len(self.planes) - 1)
        return found.finish

    def _judges(self, opened: Sequence[Launch], part: Part) -> bool:
        """Whether a loss went to the job of its logits, or of their tangents, whose tiles must have rows whole."""
        found = makers(opened, part) if part.kernel in ("loss.forward", "loss.tangent") else []
        if len(found) != 1 or any(isinstance(p.constants, Loss) for p in found[0].parts):
            return False
        job, planes = found[0], [self.planes[plane] for plane in part.reads if plane != ABSENT]
        logits = [plane.shape for plane in planes if len(plane.shape) == 4]
        target = self.planes[part.reads[KERNELS[part.kernel].reads.index("target")]]
        plain = job.product is not None and job.pool is None and len(target.shape) <= 3
        if not plain or any(shape != job.space.shape or shape[2] != 1 for shape in logits):
            return False
        dtype = "tl.float64" if planes[0].dtype == torch.float64 else "tl.float32"
        if tile_of(job, dtype).cols < job.space.cols:
            return False
        job.parts.append(part)
        return True

    def _look_through(self, part: Part) -> None:
        if KERNELS[part.kernel].kind == "free" and part.reads and part.kernel not in ("zeros", "stack"):
            self.root[part.writes[0]] = self.root[part.reads[0]]

    # --- which parts go together --------------------------------------------------------------------------------------

    def _place(self, opened: Sequence[Launch], part: Part, jobs: list[Job]) -> int | None:
        """The open launch of which the part can be a job, or go on in the one that it reads; None where it cannot."""
        reads = {plane for plane in part.reads if plane != ABSENT}
        last = max((i for i, launch in enumerate(opened) if reads & launch.makes), default=0)
        if any(reads & launch.makes for launch in opened[:last]):
            return None
        later = [launch for launch in opened[last + 1 :] if self._disturbs(launch, part, [])]
        return last if not later and self._joins(opened[last], part, jobs) else None

    def _joins(self, launch: Launch, part: Part, jobs: list[Job]) -> bool:
        reads = {plane for plane in part.reads if plane != ABSENT}
        makers = [job for job in launch.jobs if reads & job.makes]
        if not makers:
            return len(launch.jobs) + len(jobs) <= MOST_JOBS and not self._disturbs(launch, part, [])
        if any(job.pool is not None for job in makers) or self._disturbs(launch, part, makers):
            return False
        if part.kernel in POOLS:
            return len(makers) == 1 and self._pools(makers[0], part)
        fits = len({job.first for job in makers}) == 1 and (len(makers) == 1 or makers[0].first is not None)
        return fits and KERNELS[part.kernel].kind != "product" and self._same(makers[0], part)

    def _pools(self, job: Job, part: Part) -> bool:
        """Whether a pooling can end the job of what it pools, of which the job has nothing but its own points."""
        pointwise = job.first is None and not any(p.kernel in POOLS for p in job.parts)
        whole = job.space.shape == self.planes[part.reads[0]].shape and part.reads[0] in job.makes
        whole &= not job.shares
        return part.kernel != "pool.backward" and pointwise and whole and Panes.of(part.constants) is not None

    def _same(self, job: Job, part: Part) -> bool:
        return all(self.planes[plane].shape == job.space.shape for plane in part.writes if plane != ABSENT)

    def _disturbs(self, launch: Launch, part: Part, own: Sequence[Job]) -> bool:
        """Whether memory is changed in place that another job reads; the phases of one result are one job."""
        others = [job for job in launch.jobs if not any(job is one for one in own)]
        reads = {self.root[plane] for job in others for plane in job.needs}
        changed = {self.root[p.reads[0]] for job in others for p in job.parts if p.kernel == "accumulate"}
        if part.kernel == "accumulate" and self.root[part.reads[0]] in reads:
            return True
        return bool(changed & {self.root[plane] for plane in part.reads if plane != ABSENT})

    def _add(self, launch: Launch, part: Part, jobs: list[Job]) -> None:
        reads = {plane for plane in part.reads if plane != ABSENT}
        makers = [job for job in launch.jobs if reads & job.makes]
        for maker in makers:
            if part.kernel in POOLS:
                maker.pool = part
            else:
                maker.parts.append(part)
        if not makers:
            launch.jobs += jobs
        if part.kernel == "accumulate":
            self.root[part.writes[0]] = self.root[part.reads[0]]

    # --- the jobs of a part -------------------------------------------------------------------------------------------

    def _jobs(self, part: Part) -> list[Job] | None:
        """Its jobs; None where it takes a kernel of its own."""
        if isinstance(part.constants, Linear | Convolution):
            return list(_Products(self, part).jobs())
        if part.kernel == "tasks.sum" and len(self.planes[part.reads[0]].shape) in (3, 4):
            return [self._sum_of(part.writes[0], part.reads[0])]
        if part.kernel == "loss.sum" and self.planes[part.reads[0]].elements:
            tasks = self.planes[part.writes[0]].shape[0]
            return [Job(Space((tasks, 1, 1)), part.writes[0], summed=(part.reads[0],), weighed=part)]
        if part.kernel in POOLS or self._pointwise(part):
            shape = next(self.planes[plane].shape for plane in part.writes if plane != ABSENT)
            return [Job(Space(shape), parts=[part])]
        return None

    def _pointwise(self, part: Part) -> bool:
        """Whether all results have one shape, of values or of parameters, and are made element by element."""
        if part.kernel not in EXPRESSIONS:
            return False
        shapes = {self.planes[plane].shape for plane in part.writes if plane != ABSENT}
        return len(shapes) == 1 and len(next(iter(shapes))) in (3, 4)

    def share(self, job: Job, depth: int) -> Job:
        """The job of a gradient, or that of its shares: of each task where it is of all, and of pieces of the depth."""
        assert job.first is not None
        result, tasks = self.planes[job.first], job.space.shape[0]
        dtype = "tl.float64" if result.dtype == torch.float64 else "tl.float32"
        read = sum(math.prod(self.planes[plane].shape[1:]) for plane in job.needs)
        job.pieces = pieces_of(job, dtype, depth, read)
        own = tasks == result.shape[0]
        if own and job.pieces == 1:
            return job
        shape = job.space.shape if job.pieces == 1 else (tasks, job.pieces, *job.space.shape[1:])
        self.planes.append(dataclasses.replace(result, shape=shape, source=None))
        self.root.append(len(self.planes) - 1)
        waiting = self._waiting.pieces if own else self._over_tasks
        waiting[job.first] = len(self.planes) - 1
        job.first = len(self.planes) - 1
        return job

    def _sum_of(self, result: int, shares: int) -> Job:
        space, shape = Space(self.planes[result].shape), self.planes[shares].shape
        pieces = shape[1] if len(shape) > len(space.shape) else 1
        return Job(space, result, summed=(shares,), of_shares=True, pieces=pieces)

    def _sums(self, part: Part) -> list[Job]:
        """What adds the tasks' shares up, at once: they are as large as all tasks' gradients."""
        if not isinstance(part.constants, Linear | Convolution):
            return []
        found = [self._sum_of(*pair) for pair in self._over_tasks.items()]
        self._over_tasks.clear()
        return found

    def _put_together(self, opened: list[Launch], finishing: list[Part]) -> Iterator[Launch | Part]:
        """All gradients in pieces are added up, where what reads one of them may go on in the same launch."""
        for result, pieces in self._waiting.pieces.items():
            job = self._sum_of(result, pieces)
            if len(opened[1].jobs) >= MOST_JOBS:
                yield from self._closed(opened, finishing)
            beside = not (job.needs & opened[0].makes) and len(opened[0].jobs) < MOST_JOBS
            opened[0 if beside else 1].jobs.append(job)
        self._waiting.pieces.clear()


# --- products ---------------------------------------------------------------------------------------------------------

_ROLES = {
    "forward": ("x", "w", "b"),
    "backward": ("d", "x", "w"),
    "tangent": ("x", "xt", "w", "wt", "b"),
    "back_tangent": ("c", "d", "x", "xt", "w", "wt"),  # c is the cotangent beside its tangent, which is d here
}


class _Products:
    """The jobs of a linear layer's or a convolution's part."""

    def __init__(self, of: Fused, part: Part) -> None:
        self.of, self.part = of, part
        family, self.kind = part.kernel.split(".")
        self.conv, self.forward = family == "conv", self.kind in ("forward", "tangent")
        self.at = dict(zip(_ROLES[self.kind], part.reads, strict=True))
        self.window = Window.of(part.constants.window) if self.conv else None
        self.groups = self.window.last if self.window is not None else 1

    def plane(self, role: str) -> int:
        """The plane of a role, or ABSENT."""
        return self.at.get(role, ABSENT)

    def shape(self, role: str) -> tuple[int, ...]:
        """Its shape."""
        return self.of.planes[self.plane(role)].shape

    def pairs(self, *pairs: tuple[str, str]) -> list[tuple[int, int]]:
        """Those of which both are there."""
        found = [(self.plane(a), self.plane(b)) for a, b in pairs]
        return [pair for pair in found if ABSENT not in pair]

    def jobs(self) -> Iterator[Job]:
        """One for each result that is wanted."""
        if self.forward:
            pairs = self.pairs(("x", "w")) if self.kind == "forward" else self.pairs(("xt", "w"), ("x", "wt"))
            yield self._values(self.part.writes[0], pairs, "x")
            return
        dx, dw, db = self.part.writes
        if dx != ABSENT:
            job = self._values(dx, self.pairs(("d", "w"), ("c", "wt")), "d")
            yield from self._phases(job) if self.window is not None else [job]
        if dw != ABSENT:
            yield self._weights(dw, self.pairs(("d", "x"), ("c", "xt")))
        if db != ABSENT:
            yield self._bias(db)

    def _values(self, result: int, pairs: list[tuple[int, int]], role: str) -> Job:
        """y or dx, by terms (value, weight)."""
        planes, back = self.of.planes, role == "d"
        bias = self.plane("b") if not back else ABSENT
        shared = [w for _, w in pairs] + ([bias] if bias != ABSENT else [])
        merged = all(planes[w].shape[0] == 1 for w in shared) and all(
            planes[x].shape[0] == planes[result].shape[0] for x, _ in pairs
        )
        terms, depth = tuple(self._term(x, w, back) for x, w in pairs), self._depth(pairs, back)
        half = all(planes[x].dtype.itemsize == 2 for x, _ in pairs)
        product = Product(terms, depth, bias if bias != ABSENT else None, self.window, self.groups, half=half)
        return Job(Space(planes[result].shape, merged and bool(pairs)), result, product)

    def _phases(self, job: Job) -> Iterator[Job]:
        """A convolution's dx: one job for the pixels that meet the same taps."""
        assert self.window is not None and job.product is not None
        outputs = job.product.depth // math.prod(self.window.kernel)
        for phase in Phase.of(self.window):
            product = job.product._replace(depth=outputs * math.prod(phase.taps), phase=phase)
            yield Job(job.space, job.first, product)

    def _depth(self, pairs: list[tuple[int, int]], back: bool) -> int:
        if not pairs:
            return 0
        features = self.of.planes[pairs[0][0]].shape[3]
        if self.window is None:
            return features
        return features // self.groups * self.window.kernel[0] * self.window.kernel[1]

    def _term(self, x: int, w: int, back: bool) -> Term:
        if self.conv:
            ways = ("spread", "kernel_back") if back else ("patch", "kernel")
            return Term(Reading(x, ways[0]), Reading(w, ways[1]))
        turned = self.part.constants.turned == back  # of W [O, I] forward reads columns as rows
        return Term(Reading(x, "value"), Reading(w, "weight", turned))

    def _weights(self, result: int, pairs: list[tuple[int, int]]) -> Job:
        """dw, by terms (cotangent, value)."""
        planes = self.of.planes
        _, rows, cols = planes[result].shape
        tasks = max(planes[plane].shape[0] for pair in pairs for plane in pair)
        _, samples, points, _ = planes[pairs[0][0]].shape
        terms = tuple(self._weight_term(d, x) for d, x in pairs)
        half = all(planes[plane].dtype.itemsize == 2 for pair in pairs for plane in pair)
        product = Product(terms, samples * points, None, self.window, self.groups, self.groups > 1, half)
        return self.of.share(Job(Space((tasks, rows, cols)), result, product), product.depth)

    def _weight_term(self, d: int, x: int) -> Term:
        if self.conv:
            return Term(Reading(d, "value", True), Reading(x, "patch_by_weight"))
        left, right = (x, d) if self.part.constants.turned else (d, x)
        return Term(Reading(left, "value", True), Reading(right, "value"))

    def _bias(self, result: int) -> Job:
        """db, the sum of the cotangent over rows."""
        tasks, samples, points, features = self.shape("d")
        return self.of.share(Job(Space((tasks, 1, features)), result, summed=(self.plane("d"),)), samples * points)
