"""`inner_loop` as one launch: a block a task, there and back, by the program of `program.block_program`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.lowering import Unsupported
from mtml_kernels.cuda.inner_loop.placing import TooLarge
from mtml_kernels.cuda.inner_loop.program import BlockProgram, block_program, parts_of
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.schedule.backend import Arguments, Cotangents, group_of
from mtml_kernels.schedule.build import Plan, plan_of
from mtml_kernels.schedule.call import ABSENT
from mtml_kernels.schedule.loop import Given
from mtml_kernels.schema.inner_loop import (
    STARTS,
    TASKS_APART,
    Grads,
    InnerLoopArgs,
    Outputs,
    empty_outputs,
    output_shapes,
)

__all__ = ["Engine", "Persistent"]


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

    def sum_over_tasks(self, parts: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """out [P] = sum over tasks of scale [T] parts [T, P], in their order"""


class _Bound(NamedTuple):
    program: BlockProgram
    words: Tensor


class _Run(NamedTuple):
    """What a launch wrote: by the position of the result, and the tasks' shares."""

    results: list[Tensor | None]
    parts: Tensor | None
    numbers: Tensor | None


class Persistent:
    """A backend of `inner_loop` by programs of a thread block."""

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self._bound: dict[Any, tuple[Plan, _Bound]] = {}

    def program(self, a: InnerLoopArgs, given: Given | None = None) -> BlockProgram:
        """That of a call without gradients, or with these cotangents."""
        return self._bind(a, plan_of(a), given).program

    def _bind(self, a: InnerLoopArgs, plan: Plan, given: Given | None) -> _Bound:
        device = a.params[0].device
        key = id(plan), given, device
        found = self._bound.get(key)
        if found is None or found[0] is not plan:
            found = self._bound[key] = plan, self._make(a, plan, given, device)
        return found[1]

    def _make(self, a: InnerLoopArgs, plan: Plan, given: Given | None, device: torch.device) -> _Bound:
        engine, schedules = self._engine(), [plan.there]
        results = [(plane, False) for plane in plan.there.results]
        if given is not None:
            trip = plan.trip(given)
            schedules = [trip.there, trip.back]
            results = [(plane, False) for plane in trip.there.results]
            results += [(p, _is_shared(a, at, i)) for at, group in enumerate(trip.groups) for i, p in enumerate(group)]
        dtype, room = a.params[0].dtype, engine.chip_bytes(a.tasks, device)
        try:
            program = block_program(schedules[-1].planes, parts_of(*schedules), a.tasks, results, dtype, room)
        except (Unsupported, TooLarge) as why:
            raise BackendUnavailable(
                f"inner_loop: backend 'cuda' cannot run this: {why}. Use backend='triton', which goes layer by layer"
            ) from why
        return _Bound(program, torch.tensor(program.words.words, dtype=torch.int32, device=device))

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, a: InnerLoopArgs) -> Outputs:
        """The op's forward; where gradients are wanted it goes on to those of every task's own loss."""
        if not a.tasks:
            return empty_outputs(a, [])
        plan = plan_of(a)
        onward = bool(a.needs) and plan.usually.loss
        given = plan.usually if onward else None
        ones = a.params[0].new_ones(()).expand(a.tasks) if onward else None
        run = self._run(a, plan, given, Cotangents(ones, None, None, ()))
        loss, output, support, kept = output_shapes(a)
        shapes, dtype = [loss, output, support, *kept], a.params[0].dtype
        made = zip(run.results[: len(shapes)], shapes, strict=True)
        found = [a.params[0].new_zeros(s) if t is None else t.to(dtype).reshape(s) for t, s in made]
        carry = [t for t in (run.parts, run.numbers, *run.results[len(shapes) :]) if t is not None] if onward else []
        return found[0], found[1], found[2], found[3:], carry

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
            return tuple(group_of(a, at, [], [], set(), False) for at in range(len(a.groups)))
        plan = plan_of(a)
        given = cotangents.given
        scale = None
        if carry and given == plan.usually and grad_loss is not None:
            run, scale = self._carried(a, plan, carry), grad_loss.contiguous()
        else:
            run = self._run(a, plan, given, cotangents)
        return self._groups(a, plan, given, run, scale)

    def _carried(self, a: InnerLoopArgs, plan: Plan, carry: Sequence[Tensor]) -> _Run:
        program = self._bind(a, plan, plan.usually).program
        rest = list(carry)
        parts = rest.pop(0) if program.parts else None
        numbers = rest.pop(0) if program.number_parts else None
        first = len(plan.there.results)
        results: list[Tensor | None] = [None] * first
        results += [rest.pop(0) if r is not None and r.at is None else None for r in program.results[first:]]
        return _Run(results, parts, numbers)

    def _groups(self, a: InnerLoopArgs, plan: Plan, given: Given, run: _Run, scale: Tensor | None) -> tuple[Grads, ...]:
        program, trip = self._bind(a, plan, given).program, plan.trip(given)
        sums = [self._summed(run.parts, scale), self._summed(run.numbers, scale)]
        memory: dict[int, Tensor] = {}
        at = len(trip.there.results)
        planes: list[list[int]] = []
        for group in trip.groups:
            planes.append([])
            for plane in group:
                result, own = program.results[at], run.results[at]
                planes[-1].append(ABSENT if result is None else at)
                if result is not None and result.at is not None:
                    total = sums[0] if result.dtype == program.dtype else sums[1]
                    assert total is not None
                    size = torch.Size(result.shape).numel()
                    memory[at] = total[result.at : result.at + size].view(result.shape)
                elif own is not None:
                    assert result is not None
                    memory[at] = own if scale is None else own * scale.view(-1, *[1] * len(result.shape))
                at += 1
                del plane
        found = [memory.get(i) for i in range(at)]
        return tuple(group_of(a, at, group, found, set(), False) for at, group in enumerate(planes))

    def _summed(self, parts: Tensor | None, scale: Tensor | None) -> Tensor | None:
        if parts is None:
            return None
        out = parts.new_empty(parts.shape[1])
        self._engine().sum_over_tasks(parts, None if scale is None else scale.to(parts.dtype), out)
        return out

    # --- a launch -----------------------------------------------------------------------------------------------------

    def _run(self, a: InnerLoopArgs, plan: Plan, given: Given | None, cotangents: Cotangents) -> _Run:
        bound, engine = self._bind(a, plan, given), self._engine()
        program, like = bound.program, a.params[0]
        arguments = Arguments(a, cotangents)
        tensors: list[Tensor | None] = []
        strides: list[int] = []
        for argument in program.arguments:
            tensor = arguments.tensor(argument.field, argument.position).detach()
            stride = argument.stride
            if tensor.dim() and tensor.stride() == (0,) * tensor.dim():  # one number for all
                tensor, stride = tensor.reshape(-1)[:1], 0
            elif tensor.is_floating_point():
                tensor = tensor.to(argument.dtype)
            tensor = tensor.contiguous()
            tensors.append(tensor)
            strides.append(tensor.numel() // a.tasks if stride is None else stride)
        results: list[Tensor | None] = []
        for result in program.results:
            own = None
            if result is not None and result.at is None:
                own = like.new_empty((*result.lead, a.tasks, *result.shape), dtype=result.dtype)
                tensors.append(own)
                strides.append(torch.Size(result.shape).numel())
            results.append(own)
        parts = like.new_empty((a.tasks, program.parts)) if program.parts else None
        count = program.number_parts
        numbers = like.new_empty((a.tasks, count), dtype=torch.float64) if count else None
        tensors += [parts, numbers]
        strides += [program.parts, count]
        blocks = engine.blocks(program, a.tasks, like.device)
        size = program.placed.workspace_bytes // like.element_size()
        workspace = like.new_empty(blocks * size) if size else None
        if program.words.first:
            engine.run(program, bound.words, workspace, tensors, strides, a.tasks, blocks)
        return _Run(results, parts, numbers)


def _is_shared(a: InnerLoopArgs, at: int, i: int) -> bool:
    """Whether a gradient, by its group and place, is summed over tasks."""
    if at == 0:
        return not (a.spec.has(TASKS_APART) or (a.spec.has(STARTS) and a.spec.adapted[i]))
    return at in (1, 4)  # rates and the rule's numbers
