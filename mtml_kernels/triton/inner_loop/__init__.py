"""The schedule of `inner_loop` in Triton: calls as fused launches, written for their shapes; the rest kernel by kernel.

A part without a Triton kernel (views, concatenations, slices) runs with PyTorch's (schedule.torch_kernels).
"""

from __future__ import annotations

from mtml_kernels.schedule.backend import Scheduled
from mtml_kernels.schedule.call import Schedule
from mtml_kernels.schedule.graphs import CudaRecorder, Graphs
from mtml_kernels.schedule.run import Bound, Step
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.triton.inner_loop.clipping import CLIPPING
from mtml_kernels.triton.inner_loop.embedding import EMBEDDING
from mtml_kernels.triton.inner_loop.fusing import Fused
from mtml_kernels.triton.inner_loop.jobs import Launch
from mtml_kernels.triton.inner_loop.launching import LaunchKernel
from mtml_kernels.triton.inner_loop.losses import LOSSES
from mtml_kernels.triton.inner_loop.norm_sums import FINISHING, NORM_SUMS
from mtml_kernels.triton.inner_loop.softmax import SOFTMAX
from mtml_kernels.triton.inner_loop.sums import SUMS
from mtml_kernels.triton.inner_loop.updates import UPDATES

__all__ = ["PARTS", "backward", "bound", "forward"]

# By name: of parts that are in no launch. What moves elements is PyTorch's.
PARTS = {**TORCH, **NORM_SUMS, **FINISHING, **SOFTMAX, **LOSSES, **SUMS, **UPDATES, **CLIPPING, **EMBEDDING}


def bound(schedule: Schedule) -> Bound:
    """The schedule with its launches."""
    found, own = Fused(schedule), len(schedule.planes)
    wanted = {*schedule.results, *schedule.kept}
    steps: list[Step] = []
    for step, ends in reversed(found.steps):
        reads = step.needs if isinstance(step, Launch) else step.reads
        drops = (*ends, *(plane for plane in reads if plane >= own and plane not in wanted))  # tasks' shares of a sum
        if isinstance(step, Launch):
            stored = sorted(step.makes & wanted)
            kernel = LaunchKernel(step, found.planes, stored)
            steps.append((kernel, kernel.part, kernel.reads, kernel.writes, drops))
            wanted |= step.needs
        else:
            steps.append((PARTS[step.kernel], step, step.reads, step.writes, drops))
            wanted |= set(step.reads)
    return Bound.with_steps(steps[::-1], schedule, found.planes)


_scheduled = Scheduled(bound, Graphs(CudaRecorder()))
forward, backward = _scheduled.forward, _scheduled.backward
