"""`inner_loop` as one launch: a block a task, there and back, by the program of `program.block_program`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.lowering import Unsupported
from mtml_kernels.cuda.inner_loop.mlp import Bound, Perceptrons
from mtml_kernels.cuda.inner_loop.placing import TooLarge
from mtml_kernels.cuda.inner_loop.program import BlockProgram, block_program, parts_of
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.memory import in_memory
from mtml_kernels.schedule.backend import OF_SUPPORT, Arguments, Cotangents
from mtml_kernels.schedule.build import Plan, plan_of
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.loop import Given
from mtml_kernels.schema.inner_loop import (
    PER_STEP,
    QUERY_STEPS,
    STARTS,
    TASKS_APART,
    Grads,
    InnerLoopArgs,
    Outputs,
    empty_outputs,
    output_shapes,
)

__all__ = ["Engine", "Persistent"]

MOST_PLANS = 256


class Engine(Protocol):
    """What runs programs: a device, or the CPU in its place."""

    def chip_bytes(self, tasks: int, device: torch.device) -> int:
        """How much of the chip the planes of one task may take."""

    def blocks(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        """How many blocks take the tasks in turn."""

    def run(
        self, program: BlockProgram, words: Tensor, workspace: Tensor | None, tensors: Sequence[Tensor | None],
        strides: Sequence[int], tasks: int, blocks: int,
    ) -> None:  # fmt: skip
        """Launches a program on a call's tensors."""

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        """Each result = its elements, from `begins` on, of sum over tasks of scale [T] parts [T, P], in their order."""


class _Bound(NamedTuple):
    """A program for calls of given shapes, and what its launches need: made once."""

    plan: Plan
    program: BlockProgram
    words: Tensor
    blocks: int
    workspace: int  # elements, of all blocks
    outputs: int  # how many of the results are the op's outputs; gradients follow
    groups: list[list[int]]  # of the gradients: their positions among the results, ABSENT where there is none


class _Run(NamedTuple):
    """What a launch wrote: by the position of the result, and the tasks' shares."""

    results: list[Tensor | None]
    parts: Tensor | None
    numbers: Tensor | None


class Persistent:
    """A backend of `inner_loop` by programs of a thread block, and by the kernels of perceptrons where a call has one.

    form: the name of a backend whose calls these kernels take, or nothing does.
    """

    def __init__(
        self, engine: Callable[[], Engine], perceptrons: Perceptrons | None = None, form: str | None = None
    ) -> None:
        self._engine, self._perceptrons, self._form = engine, perceptrons, form
        self._plans: dict[Any, tuple[Any, Plan]] = {}
        self._bound: dict[Any, _Bound] = {}
        self._ones: dict[Any, Tensor] = {}

    def program(self, a: InnerLoopArgs, given: Given | None = None) -> BlockProgram:
        """That of a call without gradients, or with these cotangents."""
        return self._bind(a, self._plan(a), given).program

    def of_forward(self, a: InnerLoopArgs) -> BlockProgram:
        """That which the op's forward launches."""
        return self.program(a, _onward(a, self._plan(a)))

    def perceptron(self, a: InnerLoopArgs) -> tuple[Perceptrons, Bound] | None:
        """The kernel that is compiled for a call's network, where there is one."""
        bound = None if self._perceptrons is None else self._perceptrons.bound(a)
        return None if self._perceptrons is None or bound is None else (self._perceptrons, bound)

    def bound_for_forward(self, a: InnerLoopArgs) -> tuple[_Bound, Tensor | None]:
        """What the op's forward launches, and the cotangents of the losses where it goes on to the gradients."""
        plan = self._plan(a)
        given = _onward(a, plan)
        return self._bind(a, plan, given), None if given is None else self._one_each(a)

    # --- made once for calls of given shapes --------------------------------------------------------------------------

    def _plan(self, a: InnerLoopArgs) -> Plan:
        """`plan_of`, by what of a call its spec does not fix."""
        optional = (a.query_y, a.support_mask, a.query_mask, a.step_weights)
        key = (
            id(a.spec), a.needs, a.params[0].dtype, len(a.hyper), len(a.moments), a.support_y.shape, a.support_y.dtype,
            *[t.shape for t in a.support_x], *[t.shape for t in a.query_x], *[t.shape for t in a.lr],
            *[None if t is None else (t.shape, t.dtype) for t in optional],
        )  # fmt: skip
        found = self._plans.get(key)
        if found is None or found[0] is not a.spec:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            found = self._plans[key] = a.spec, plan_of(a)
        return found[1]

    def _bind(self, a: InnerLoopArgs, plan: Plan, given: Given | None) -> _Bound:
        if self._form is not None:
            raise self._refusal(self._form, a)
        key = id(plan), given, a.params[0].device
        found = self._bound.get(key)
        if found is None or found.plan is not plan:
            if len(self._bound) >= MOST_PLANS:
                self._bound.clear()
            found = self._bound[key] = self._make(a, plan, given)
        return found

    def _refusal(self, form: str, a: InnerLoopArgs) -> BackendUnavailable:
        """What of a call its kernels do not take."""
        perceptrons = self._perceptrons
        assert perceptrons is not None
        bound = perceptrons.bound(a) is not None
        why = "what flows back is more than the losses' gradient" if bound else perceptrons.why_not(a)
        return BackendUnavailable(
            f'backend: expected a call that kernels on matrix units take, got "{form}" where {why}. Use '
            'backend="cuda", which computes in float32'
        )

    def _make(self, a: InnerLoopArgs, plan: Plan, given: Given | None) -> _Bound:
        schedules, device, dtype = [plan.there], a.params[0].device, a.params[0].dtype
        results = [(plane, False) for plane in plan.there.results]
        groups: list[list[int]] = []
        if given is not None:
            trip = plan.trip(given)
            schedules = [trip.there, trip.back]
            results = [(plane, False) for plane in trip.there.results]
            groups = _positions(trip.groups, len(results))
            results += [(p, _is_shared(a, at, i)) for at, group in enumerate(trip.groups) for i, p in enumerate(group)]
        engine = self._engine()
        try:
            room = engine.chip_bytes(a.tasks, device)
            program = block_program(schedules[-1].planes, parts_of(*schedules), a.tasks, results, dtype, room)
        except (Unsupported, TooLarge) as why:
            raise BackendUnavailable(
                f"inner_loop: backend 'cuda' cannot run this: {why}. Use backend='triton', which goes layer by layer"
            ) from why
        words = torch.tensor(program.words.words, dtype=torch.int32, device=device)
        blocks = engine.blocks(program, a.tasks, device)
        workspace = blocks * (program.placed.workspace_bytes // dtype.itemsize)
        return _Bound(plan, program, words, blocks, workspace, len(schedules[0].results), groups)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, a: InnerLoopArgs) -> Outputs:
        """The op's forward; where gradients are wanted it goes on to those of every task's own loss."""
        if not a.tasks:
            return empty_outputs(a, [])
        if self._perceptrons is not None and (perceptron := self._perceptrons.bound(a)) is not None:
            return self._perceptrons.forward(a, perceptron)
        plan = self._plan(a)
        given = _onward(a, plan)
        onward = given is not None
        run = self._run(a, plan, given, Cotangents(self._one_each(a) if onward else None, None, None, ()))
        loss, output, support, kept = output_shapes(a)
        shapes, like = [loss, output, support, *kept], a.params[0]
        made = zip(run.results[: len(shapes)], shapes, strict=True)
        found = [like.new_zeros(s) if t is None else t.reshape(s) for t, s in made]
        carry = [t for t in (run.parts, run.numbers, *run.results[len(shapes) :]) if t is not None] if onward else []
        return found[0], found[1], found[2], found[3:], carry

    def _one_each(self, a: InnerLoopArgs) -> Tensor:
        """The cotangent of every task's own loss: written once, read by all calls."""
        like = a.params[0]
        key = a.tasks, like.dtype, like.device
        found = self._ones.get(key)
        if found is None:
            if len(self._ones) >= MOST_PLANS:
                self._ones.clear()
            found = self._ones[key] = torch.ones(a.tasks, dtype=like.dtype, device=like.device)
        return found

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad_loss: Tensor | None,
        grad_output: Tensor | None,
        grad_support_losses: Tensor | None,
        grad_adapted: Sequence[Tensor | None],
        a: InnerLoopArgs,
        carry: Sequence[Tensor],
    ) -> tuple[Grads, ...]:
        """The op's backward: scales what forward left, or runs the whole again from other cotangents."""
        cotangents = Cotangents(grad_loss, grad_output, grad_support_losses, grad_adapted)
        single = (grad_loss, grad_output, grad_support_losses)
        if not (a.needs and a.tasks) or all(g is None for g in (*single, *grad_adapted)):
            return tuple(_group(a, at, [ABSENT] * len(tensors), []) for at, (_, tensors) in enumerate(a.groups))
        plan, given, scale = self._plan(a), cotangents.given, None
        if self._perceptrons is not None and (perceptron := self._perceptrons.bound(a)) is not None:
            if given == plan.usually and grad_loss is not None:
                carry = carry or self._perceptrons.forward(a, perceptron)[-1]  # a registered op keeps none
                params, lr = self._perceptrons.gradients(a, perceptron, carry[0], grad_loss)
                others: list[Grads] = [[None] * len(tensors) for _, tensors in a.groups[2:]]
                return (params, lr, *others)
            carry = ()  # which is no program's
        bound = self._bind(a, plan, given)
        if carry and given == plan.usually and grad_loss is not None:
            run, scale = self._carried(bound, carry), grad_loss.to(a.params[0].dtype).contiguous()
        else:
            run = self._run(a, plan, given, cotangents)
        return self._groups(a, bound, run, scale)

    @staticmethod
    def _carried(bound: _Bound, carry: Sequence[Tensor]) -> _Run:
        program, rest = bound.program, list(carry)
        parts = rest.pop(0) if program.parts else None
        numbers = rest.pop(0) if program.number_parts else None
        results: list[Tensor | None] = [None] * bound.outputs
        for result in program.results[bound.outputs :]:
            results.append(rest.pop(0) if result is not None and result.at is None else None)
        return _Run(results, parts, numbers)

    def _groups(self, a: InnerLoopArgs, bound: _Bound, run: _Run, scale: Tensor | None) -> tuple[Grads, ...]:
        memory: list[Tensor | None] = [None] * len(bound.program.results)
        for parts, dtype in ((run.parts, bound.program.dtype), (run.numbers, torch.float64)):
            if parts is not None:
                self._sum(bound.program, parts, dtype, scale, memory)
        for at, own in enumerate(run.results[bound.outputs :], bound.outputs):
            if own is not None:
                result = bound.program.results[at]
                assert result is not None
                memory[at] = own if scale is None else own * scale.view(-1, *[1] * len(result.shape))
        return tuple(_group(a, at, group, memory) for at, group in enumerate(bound.groups))

    def _sum(
        self, program: BlockProgram, parts: Tensor, dtype: torch.dtype, scale: Tensor | None,
        memory: list[Tensor | None],
    ) -> None:  # fmt: skip
        """The sums over tasks of what lies in these parts, each in memory of its own."""
        begins: list[int] = []
        made: list[Tensor | None] = []
        for i, result in enumerate(program.results):
            if result is not None and result.at is not None and result.dtype == dtype:
                memory[i] = parts.new_empty(result.shape)
                made.append(memory[i])
                begins.append(result.at)
        scale = scale if scale is None or scale.dtype == parts.dtype else scale.to(parts.dtype)
        self._engine().sum_over_tasks(parts, scale, made, begins)

    # --- a launch -----------------------------------------------------------------------------------------------------

    def _run(self, a: InnerLoopArgs, plan: Plan, given: Given | None, cotangents: Cotangents) -> _Run:
        bound, tasks, like = self._bind(a, plan, given), a.tasks, a.params[0]
        program = bound.program
        arguments = Arguments(a, cotangents)
        tensors: list[Tensor | None] = []
        strides: list[int] = []
        for argument in program.arguments:
            tensor = arguments.tensor(argument.field, argument.position)
            if tensor.dtype is not argument.dtype:
                tensor = tensor.to(argument.dtype)
            tensor = in_memory(f"inner_loop: {argument.field}", tensor, like.device.type)
            tensors.append(tensor)
            strides.append(tensor.numel() // tasks if argument.stride is None else argument.stride)
        results: list[Tensor | None] = []
        for result in program.results:
            own = None
            if result is not None and result.at is None:
                own = like.new_empty((*result.lead, tasks, *result.shape), dtype=result.dtype)
                tensors.append(own)
                strides.append(result.elements)
            results.append(own)
        count = program.number_parts
        parts = like.new_empty((tasks, program.parts)) if program.parts else None
        numbers = like.new_empty((tasks, count), dtype=torch.float64) if count else None
        tensors += [parts, numbers]
        strides += [program.parts, count]
        workspace = like.new_empty(bound.workspace) if bound.workspace else None
        if program.words.first:
            self._engine().run(program, bound.words, workspace, tensors, strides, tasks, bound.blocks)
        return _Run(results, parts, numbers)


def _onward(a: InnerLoopArgs, plan: Plan) -> Given | None:
    """The cotangents with which forward goes on to the gradients; the losses of the steps have their own."""
    return plan.usually if a.needs and plan.usually.loss and not a.spec.has(QUERY_STEPS) else None


def _positions(groups: Sequence[Sequence[int]], first: int) -> list[list[int]]:
    """Where gradients stand among the results; ABSENT where there is none."""
    found: list[list[int]] = []
    at = first
    for group in groups:
        found.append([ABSENT if plane == ABSENT else at + i for i, plane in enumerate(group)])
        at += len(group)
    return found


def _group(a: InnerLoopArgs, at: int, positions: Sequence[int], memory: Sequence[Tensor | None]) -> Grads:
    """One group of gradients in the shapes of their tensors; each has memory of its own already."""
    needed, tensors = a.groups[at]
    found: Grads = []
    for i, (own, position) in enumerate(zip(tensors, positions, strict=False)):  # of absent data there is none
        if not needed or not own.is_floating_point():
            found.append(None)
            continue
        tensor, shape = None if position == ABSENT else memory[position], a.gradient_shape(at, i)
        if tensor is None:
            tensor = own.new_zeros(shape)
        elif a.spec.has(PER_STEP) and at in OF_SUPPORT:  # [K, T, S, ...], as the caller has it [T, K, S, ...]
            tensor = tensor.transpose(0, 1)
        found.append(tensor.reshape(shape).to(own.dtype).contiguous())
    return found


def _is_shared(a: InnerLoopArgs, at: int, i: int) -> bool:
    """Whether a gradient, by its group and place, is summed over tasks."""
    if at == 0:
        return not (a.spec.has(TASKS_APART) or (a.spec.has(STARTS) and a.spec.adapted[i]))
    return at in (1, 4)  # rates and the rule's numbers
