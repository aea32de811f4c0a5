"""The inner loop as parts: K steps and the query loss, and the way back by forward-over-reverse.

    theta_{k+1} = theta_k - alpha_k g_k,            g_k = grad of the support loss at theta_k
    lambda_K    = w_K grad L_q(theta_K) + ext_K
    lambda_k    = lambda_{k+1} + H_k V + s_k g_k + w_k grad L_q(theta_k) + ext_k,    V = -alpha_k lambda_{k+1}
    dalpha_k    = -sum g_k lambda_{k+1}
With another update rule, update.adjoint says what takes the place of V and dalpha. H_k V is the tangent of the gradient
along V. What the way back reads of a step is what the step left, or, where that is too much memory for all of them,
what is left by running the step again from the last checkpoint (`memory.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mtml_kernels.batch_norm import step_row
from mtml_kernels.program.encoding import LAYOUT_IN_OUT, LAYOUT_STEPS, decode
from mtml_kernels.schedule import nodes
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.draft import Draft
from mtml_kernels.schedule.kernels import Shape
from mtml_kernels.schedule.passes import Along, Pass, depends
from mtml_kernels.schedule.sets import DataSink, SampleSet
from mtml_kernels.schedule.updates import Update
from mtml_kernels.schema.inner_loop import (
    KEEP_LAST,
    KEEP_STEPS,
    MOMENTS,
    NEED_HYPER,
    NEED_LR,
    NEED_MOMENTS,
    NEED_PARAMS,
    NEED_QUERY_MASK,
    NEED_QUERY_X,
    NEED_QUERY_Y,
    NEED_SUPPORT_MASK,
    NEED_SUPPORT_X,
    NEED_SUPPORT_Y,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    InnerLoopArgs,
)

__all__ = ["Given", "Loop", "Step", "WayBack"]

assert nodes is not None  # its import fills the table of operations


class Given(NamedTuple):
    """Which cotangents a way back has."""

    loss: bool
    output: bool
    support_losses: bool
    adapted: tuple[bool, ...]


@dataclasses.dataclass
class Step:
    """What one inner step leaves for the way back."""

    on: Pass
    each: int  # losses of the samples
    gradients: list[int]  # g of every parameter, clipped; ABSENT where it has none
    raw: list[int]  # before clipping
    scale: int  # by which clipping scales
    theta: list[int]  # after it
    moments: list[list[int]]  # by plane of the rule, then by parameter


class Gradients:
    """The sink of an inner step: a parameter's gradient is complete when its last reader has given its share."""

    over_tasks: frozenset[int] = frozenset()
    inputs = False

    def __init__(self, loop: Loop) -> None:
        self.loop, self.found = loop, [ABSENT] * len(loop.adapted)

    def wants(self, param: int) -> bool:
        return self.loop.adapted[param]

    def take(self, param: int, plane: int) -> None:
        self.found[param] = self.loop.draft.sum_of(self.found[param], plane, f"gradient of parameter {param}")

    def take_input(self, index: int, plane: int) -> None:
        raise AssertionError("an inner step wants no gradient of its inputs")


class Loop:
    """The way there. `a`: any call of these shapes; only shapes and dtypes of its tensors are looked at."""

    def __init__(self, a: InnerLoopArgs) -> None:
        spec = a.spec
        self.a, self.spec = a, spec
        self.draft = Draft(a.params[0].dtype)
        self.program = decode(tuple(spec.program))
        self.adapted = spec.adapted
        self.support = SampleSet(self.draft, a, self.program, query=False)
        self.query = SampleSet(self.draft, a, self.program, query=True)
        self.update = Update(self.draft, a, self.program)
        self.theta: list[list[int]] = [[self._start(i) for i in range(len(a.params))]]
        self.moments = [self.update.given_moments()]
        self.steps: dict[int, Step] = {}
        self.queries: dict[int, Pass] = {}
        self.query_seeds: dict[int, int] = {}
        self.keeps_gradient = bool(a.needs & NEED_LR) or (bool(a.needs) and not self.update.plain)

    def _start(self, i: int) -> int:
        layout, rows, cols = self.program.params[i]
        stored = (cols, rows) if layout == LAYOUT_IN_OUT else (rows, cols)
        own = self.adapted[i] and self.spec.has(STARTS)
        return self.draft.argument("params", i, (self.a.tasks if own else 1, *stored), f"parameter {i}")

    def _rows(self, k: int, query: bool) -> dict[int, int]:
        """Of parameters with a row for every step, the row that a pass at theta_k reads."""
        return {
            i: step_row(rows, k, query)
            for i, (layout, rows, _) in enumerate(self.program.params)
            if layout == LAYOUT_STEPS
        }

    def run_set(self, part: SampleSet, k: int) -> Pass:
        """All values of a set at theta_k."""
        self.draft.where = f"step {k}: {part.name} values"
        return part.run(self.theta[k], k, list(self.spec.consts), self._rows(k, part.query))

    # --- the way there ----------------------------------------------------------------------------------------------

    def run_step(self, k: int) -> Step:
        """One inner step; leaves theta_{k+1} and the moments after it."""
        p = self.run_set(self.support, k)
        moving = self.support.judged and depends(self.program, lambda i: self.adapted[i])[self.program.output]
        judged = self.support.judge(p, k, value=True, cotangent=moving)
        sink = Gradients(self)
        self.draft.where = f"step {k}: gradient"
        if moving:
            p.pull(judged.cotangent, sink, keep=True)
        raw = sink.found
        gradients, scale = self.update.clip(raw)
        theta, moments = self.update.step(k, self.theta[k], gradients, self.moments[k])
        step = Step(p, judged.each, gradients, raw, scale, theta, moments)
        self.set_state(k + 1, theta, moments)
        self.steps[k] = step
        return step

    def set_state(self, k: int, theta: list[int], moments: list[list[int]]) -> None:
        """theta_k and the moments before step k."""
        if len(self.theta) == k:
            self.theta.append(theta)
            self.moments.append(moments)
        else:
            self.theta[k], self.moments[k] = theta, moments

    def run_query(self, k: int, cotangent: bool) -> tuple[int, int]:
        """(output, losses of the samples) at theta_k; leaves the pass for the way back."""
        p = self.run_set(self.query, k)
        judged = self.query.judge(p, k, value=True, cotangent=cotangent)
        self.queries[k], self.query_seeds[k] = p, judged.cotangent
        return judged.output, judged.each

    def forward(self) -> tuple[list[int], list[int]]:
        """The whole way there. Returns the planes of loss, output, support losses, and of what is kept."""
        steps, spec = self.spec.steps, self.spec
        weighed = self.a.step_weights is not None and self.query.judged
        every = spec.has(QUERY_STEPS) or weighed
        outputs, query_each = [], []
        for k in range(steps + 1):
            if self.a.query_x and (k == steps or every):
                output, each = self.run_query(k, cotangent=bool(self.a.needs) and k == steps)
                outputs.append(output)
                query_each.append(each)
            if k < steps:
                self.run_step(k)
        self.draft.where = "losses"
        judged = self.support.judged
        support = [self.support.total(self.steps[k].each, k) for k in range(steps) if judged]
        losses = [self.query.total(each, steps) for each in query_each] if self.query.judged else []
        return [
            self._loss(losses, weighed),
            self.stacked(outputs) if spec.has(QUERY_STEPS) else outputs[-1] if outputs else ABSENT,
            self.stacked(support),
        ], self._kept()

    def _loss(self, losses: list[int], weighed: bool) -> int:
        if not losses or self.spec.has(QUERY_STEPS):
            return self.stacked(losses)
        if not weighed:
            return losses[-1]
        total = ABSENT
        for k, loss in enumerate(losses):
            total = self.draft.sum_of(total, self.weighed_by_step(loss, k), "weighed query loss")
        return total

    def weighed_by_step(self, plane: int, k: int) -> int:
        """Times w_k."""
        weight = self.draft.argument("step_weights", 0, (), f"w_{k}", step=k)
        shape, dtype = self.draft.shape(plane), self.draft.planes[plane].dtype
        return self.draft.emit("scale", (plane, weight), [shape], f"times w_{k}", None, [dtype])[0]

    def stacked(self, planes: Sequence[int]) -> int:
        if not planes:
            return ABSENT
        shape, dtype = self.draft.shape(planes[0]), self.draft.planes[planes[0]].dtype
        return self.draft.emit("stack", planes, [(len(planes), *shape)], "of all steps", 0, [dtype])[0]

    def _kept(self) -> list[int]:
        """The adapted parameters and moments that are asked for."""
        spec, found = self.spec, []
        for i in [i for i, flag in enumerate(self.adapted) if flag]:
            if spec.keep == KEEP_LAST:
                found.append(self.own(self.theta[spec.steps][i]))
            elif spec.keep == KEEP_STEPS:
                found.append(self.stacked([self.own(theta[i]) for theta in self.theta]))
        if spec.has(MOMENTS):
            found += [plane[i] for plane in self.moments[spec.steps] for i, flag in enumerate(self.adapted) if flag]
        return found

    def own(self, plane: int) -> int:
        """A parameter as [T, rows, cols] in the dtype of sums, all tasks' own."""
        shape = (self.a.tasks, *self.draft.shape(plane)[1:])
        if self.draft.shape(plane) == shape:
            return plane
        dtype = self.draft.planes[plane].dtype
        return self.draft.emit("expand", (plane,), [shape], "of every task", Shape(shape), [dtype])[0]


class WayBack:
    """Lambda from theta_K down to theta_0 and everything that flows off on the way, after `Loop.forward`."""

    inputs = False

    def __init__(self, loop: Loop, given: Given) -> None:
        self.loop, self.given, self.draft = loop, given, loop.draft
        self.a, self.spec, self.needs = loop.a, loop.spec, loop.a.needs
        self.lam = [ABSENT] * len(loop.adapted)
        self.support, self.query = DataSink(), DataSink()
        self.support_steps: dict[int, DataSink] = {}
        self.over_tasks: frozenset[int] = frozenset()
        self.level = loop.spec.steps
        self.data: DataSink | None = None
        self.apart = loop.spec.has(TASKS_APART)
        moments = len(loop.update.names)
        self.mu = [[ABSENT] * len(loop.adapted) for _ in range(moments)]

    # --- as a sink --------------------------------------------------------------------------------------------------

    def wants(self, param: int) -> bool:
        """Adapted parameters on the way; at theta_0, and the others, where their gradient is asked for."""
        return bool(self.needs & NEED_PARAMS) or (self.loop.adapted[param] and self.level > 0)

    def take(self, param: int, plane: int) -> None:
        """A share of lambda."""
        if param in self.over_tasks and self.draft.shape(plane)[0] > 1:
            plane = self._summed(plane)
        self.lam[param] = self.draft.sum_of(self.lam[param], plane, f"lambda of parameter {param}")

    def take_input(self, index: int, plane: int) -> None:
        """A share of an input's gradient."""
        assert self.data is not None
        x = self._input_shape(index)
        flat = plane
        if self.draft.shape(plane) != x:
            flat = self.draft.one("view", (plane,), x, "as the input lies", Shape(x))
        self.data.inputs[index] = self.draft.sum_of(
            self.data.inputs.get(index, ABSENT), flat, f"gradient of input {index}"
        )

    def _input_shape(self, index: int) -> tuple[int, ...]:
        samples = self.query_pass if self.reading_query else self.support_pass
        return self.draft.shape(samples.inputs[index])

    def _summed(self, plane: int) -> int:
        shape, dtype = (1, *self.draft.shape(plane)[1:]), self.draft.planes[plane].dtype
        return self.draft.own(self.draft.emit("tasks.sum", (plane,), [shape], "over tasks", None, [dtype])[0])

    # --- the way ----------------------------------------------------------------------------------------------------

    def run(self, replay: Sequence[range]) -> None:
        """All of it. `replay`: the stretches of steps, last first, whose state is to be made again before they are gone
        through.
        """
        stretches = {stretch.stop - 1: stretch for stretch in replay}
        self._enter(self.spec.steps)
        self._query(self.spec.steps)
        self._external(self.spec.steps)
        self._start_moments()
        for k in reversed(range(self.spec.steps)):
            if k in stretches:
                for j in stretches[k]:
                    self.loop.run_step(j)
            self._step(k)
            self._query(k)
            self._external(k)
        self._finish()

    def _enter(self, level: int) -> None:
        """From here on lambda is that of theta_level: summed over tasks where all tasks share it."""
        self.level = level
        shared = [] if self.apart else [
            i for i, flag in enumerate(self.loop.adapted) if not flag or (level == 0 and not self.spec.has(STARTS))
        ]  # fmt: skip
        self.over_tasks = frozenset(shared)
        if level == 0:
            for i in shared:
                if self.lam[i] != ABSENT and self.draft.shape(self.lam[i])[0] > 1:
                    self.lam[i] = self._summed(self.lam[i])

    def _cotangent(self, field: str, index: int, shape: tuple[int, ...], k: int | None) -> int:
        return self.draft.argument(field, index, shape, f"cotangent of {field[5:]}", step=k)

    # --- the query set ----------------------------------------------------------------------------------------------

    def _query(self, k: int) -> None:
        """w_k grad L_q(theta_k), and the cotangent of the output."""
        spec, loop, last = self.spec, self.loop, k == self.spec.steps
        every = spec.has(QUERY_STEPS)
        weighed = self.a.step_weights is not None and loop.query.judged and not every
        loss = self.given.loss and loop.query.judged and (last or every or weighed)
        output = self.given.output and bool(self.a.query_x) and (last or every)
        if not (loss or output):
            return
        if not last or k not in loop.queries:
            p = loop.run_set(loop.query, k)
            d = loop.query.judge(p, k, value=False, cotangent=loss).cotangent
        else:
            p, d = loop.queries[k], loop.query_seeds[k]
        self.draft.where = f"step {k}: query gradient"
        self._pull_query(k, p, d if loss else ABSENT, output, weighed)

    def _pull_query(self, k: int, p: Pass, d: int, output: bool, weighed: bool) -> None:
        step = k if self.spec.has(QUERY_STEPS) else None
        seed, shape, scale = ABSENT, p.shape(self.loop.program.output), ABSENT
        if d != ABSENT:
            scale = self._cotangent("grad_loss", 0, (self.a.tasks,), step)
            scale = self.loop.weighed_by_step(scale, k) if weighed else scale
            seed = self.draft.one("scale", (d, scale), shape, "times the loss' cotangent")
        if output:
            flat = (self.a.tasks, p.samples, shape[2] * shape[3])
            given = self._cotangent("grad_output", 0, flat, step)
            given = self.draft.one("view", (given,), shape, "cotangent of the output", Shape(shape))
            seed = self.draft.sum_of(seed, given, "cotangent of the output")
        self.query_pass, self.reading_query, self.data = p, True, self.query
        self.inputs = bool(self.needs & NEED_QUERY_X)
        p.pull(seed, self)
        y, mask = self.a.query_y, self.a.query_mask
        wants = _present(self.needs & NEED_QUERY_Y, y), _present(self.needs & NEED_QUERY_MASK, mask)
        self.loop.query.data(p, None, scale, k, wants, self.query)

    # --- one step back ----------------------------------------------------------------------------------------------

    def _step(self, k: int) -> None:
        loop, step = self.loop, self.loop.steps[k]
        self.draft.where = f"step {k}: V"
        directions, self.lam, self.mu = loop.update.back(k, step, loop.theta[k], loop.moments[k], self.lam, self.mu)
        self._enter(k)
        directions = [ABSENT] * len(directions) if self.spec.first_order else directions
        seed = ABSENT
        if self.given.support_losses:
            seed = self._cotangent("grad_support_losses", 0, (self.a.tasks,), k)
        if seed == ABSENT and all(v == ABSENT for v in directions):
            return
        self.inputs = bool(self.needs & NEED_SUPPORT_X)
        y, mask = self.a.support_y, self.a.support_mask
        wants = _present(self.needs & NEED_SUPPORT_Y, y), _present(self.needs & NEED_SUPPORT_MASK, mask)
        if not (self.inputs or any(wants) or any(map(self.wants, range(len(self.lam))))):
            return
        self._along(k, step.on, directions, seed, wants)

    def _along(self, k: int, p: Pass, directions: list[int], seed: int, wants: tuple[bool, bool]) -> None:
        loop = self.loop
        along: Along | None = None
        if any(v != ABSENT for v in directions):
            self.draft.where = f"step {k}: tangents"
            along = p.run_along(directions)
        dt = loop.support.along(p, along, seed, k)
        self.draft.where = f"step {k}: H V"
        self.support_pass, self.reading_query = p, False
        self.data = self.support_steps.setdefault(k, DataSink()) if loop.support.per_step else self.support
        if dt != ABSENT:
            p.pull(dt, self, along)
        loop.support.data(p, along, seed, k, wants, self.data)

    def _external(self, k: int) -> None:
        """Cotangents of the adapted parameters that the caller got."""
        steps = self.spec.keep == KEEP_STEPS
        if not (steps or (self.spec.keep == KEEP_LAST and k == self.spec.steps)):
            return
        for at, i in enumerate(i for i, flag in enumerate(self.loop.adapted) if flag):
            if self.given.adapted[at] and self.wants(i):
                shape = (self.a.tasks, *self.draft.shape(self.loop.theta[0][i])[1:])
                self.take(i, self._cotangent("grad_adapted", at, shape, k if steps else None))

    def _start_moments(self) -> None:
        adapted = [i for i, flag in enumerate(self.loop.adapted) if flag]
        if self.spec.has(MOMENTS):
            first = len(adapted) if self.spec.keep else 0
            for plane, of_plane in enumerate(self.mu):
                for at, i in enumerate(adapted):
                    index = first + plane * len(adapted) + at
                    if self.given.adapted[index]:
                        shape = (self.a.tasks, *self.draft.shape(self.loop.theta[0][i])[1:])
                        of_plane[i] = self._cotangent("grad_adapted", index, shape, None)

    # --- results ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The sums over tasks that are left, and the results group by group as `InnerLoopArgs.groups` has them."""
        self.draft.where = "sums over tasks"
        if not self.apart:
            for i, plane in enumerate(self.lam):
                own = self.loop.adapted[i] and self.spec.has(STARTS)
                if plane != ABSENT and not own and self.draft.shape(plane)[0] > 1:
                    self.lam[i] = self._summed(plane)
        needs, update = self.needs, self.loop.update
        support_x, support_y, support_mask = self._support_data()
        query_x = [self.query.inputs.get(i, ABSENT) for i in range(len(self.a.query_x))]
        nothing = [ABSENT] * len(self.lam)
        self.results = [
            self.lam if needs & NEED_PARAMS else nothing,
            update.rate_gradients() if needs & NEED_LR else [ABSENT] * len(self.a.lr),
            support_x,
            query_x,
            [update.hyper_gradient if needs & NEED_HYPER else ABSENT] * len(self.a.hyper),
            self._moments() if needs & NEED_MOMENTS else [ABSENT] * len(self.a.moments),
            [support_y],
            [self.query.target],
            [support_mask],
            [self.query.mask],
        ]

    def _moments(self) -> list[int]:
        if not self.a.moments:
            return []
        return [plane[i] for plane in self.mu for i, flag in enumerate(self.loop.adapted) if flag]

    def _support_data(self) -> tuple[list[int], int, int]:
        count = len(self.a.support_x)
        if not self.loop.support.per_step:
            one = self.support
            return [one.inputs.get(i, ABSENT) for i in range(count)], one.target, one.mask
        found = [self.support_steps.get(k, DataSink()) for k in range(self.spec.steps)]
        by_step = [[sink.inputs.get(i, ABSENT) for sink in found] for i in range(count)]
        targets, masks = [sink.target for sink in found], [sink.mask for sink in found]
        return [self._over_steps(planes) for planes in by_step], self._over_steps(targets), self._over_steps(masks)

    def _over_steps(self, planes: list[int]) -> int:
        """[K, T, S, ...], zeros for a step that got nothing; the caller turns it to [T, K, S, ...]."""
        some = next((plane for plane in planes if plane != ABSENT), ABSENT)
        if some == ABSENT:
            return ABSENT
        shape, dtype = self.draft.shape(some), self.draft.planes[some].dtype
        zeros = ABSENT if ABSENT not in planes else self.draft.zeros(shape, some, dtype, "no gradient")
        filled = [zeros if plane == ABSENT else plane for plane in planes]
        return self.loop.stacked(filled)


def _present(needed: int, tensor: Tensor | None) -> bool:
    """Whether a gradient is wanted of a tensor that can have one: at the op's own door all may be asked for."""
    return bool(needed) and tensor is not None and tensor.is_floating_point()
