"""Runs a schedule with a provider's kernels: parts in their order, planes let go of after their last reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.schedule.call import ABSENT, Part, Plane, Schedule

__all__ = ["Bound", "Kernel", "Step"]

Kernel = Callable[..., tuple[Tensor | None, ...]]
Step = tuple[Kernel, Part, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # kernel, part, reads, writes, drops


class Bound(NamedTuple):
    """A schedule with a provider's kernels, step by step: `arguments` are the planes that it reads of the caller's."""

    steps: list[Step]
    arguments: list[tuple[int, Plane]]
    planes: int

    @staticmethod
    def of(schedule: Schedule, kernels: Mapping[str, Kernel]) -> Bound:
        """Made once for each schedule."""
        steps: list[Step] = []
        for call in schedule.calls:
            last = len(call.parts) - 1
            for i, part in enumerate(call.parts):
                drops = call.drops if i == last else ()
                steps.append((kernels[part.kernel], part, part.reads, part.writes, drops))
        return Bound.with_steps(steps, schedule, schedule.planes)

    @staticmethod
    def with_steps(steps: list[Step], schedule: Schedule, planes: Sequence[Plane]) -> Bound:
        """Of steps of the provider's own making, which may have planes of their own behind the schedule's."""
        read = {plane for step in steps for plane in step[2]} | set(schedule.results)
        arguments = [(i, planes[i]) for i in sorted(read - {ABSENT}) if planes[i].source is not None]
        return Bound(steps, arguments, len(planes))

    def run(self, given: Callable[[Plane], Tensor], before: Mapping[int, Tensor]) -> list[Tensor | None]:
        """All planes after the run, those that were let go of None.

        Args:
            given: the tensor of an argument's plane.
            before: planes that an earlier schedule left.
        """
        memory: list[Any] = [None] * self.planes
        for i, tensor in before.items():
            memory[i] = tensor
        with torch.no_grad():
            for i, plane in self.arguments:
                memory[i] = given(plane)
            for kernel, part, reads, writes, drops in self.steps:
                results = kernel(part, *[None if i == ABSENT else memory[i] for i in reads])
                for i, result in zip(writes, results, strict=True):
                    if i != ABSENT:
                        memory[i] = result
                for i in drops:
                    memory[i] = None
        return memory
