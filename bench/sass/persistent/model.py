"""A launch's time from the clocks of one task (emulation/clocks.py).

    time     launch + max(latency, work)
    latency  rounds * the clocks of a task: its phases' chains, and all that a phase does where a block is alone
    work     tasks of a multiprocessor * the clocks of its busiest unit for one task

A multiprocessor holds as many blocks as device.py starts there; each takes tasks in turn, so that there are rounds.
Left out: what a cold instruction cache costs (the kernel is larger than the first level), the sum over tasks after it,
and the host.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.sass.chips import SCHEDULERS, Chip
from bench.sass.emulation.clocks import Phase
from mtml_kernels.cuda.inner_loop import predicted
from mtml_kernels.cuda.inner_loop.predicted import Clocks, Time

__all__ = ["BEFORE", "GAP_SECONDS", "LAUNCH_SECONDS", "Time", "summed", "time_of"]

GAP_SECONDS = predicted.GAP_SECONDS  # measured on an H200 within a graph
LAUNCH_SECONDS = predicted.ENDS_SECONDS
BEFORE = 2  # barriers before the program's first phase has begun


def summed(phases: Sequence[Phase]) -> Clocks:
    """Of all phases of a block."""
    units = {"issue": sum(phase.issued for phase in phases) / SCHEDULERS}
    for phase in phases:
        for name, clocks in phase.units.items():
            units[name] = units.get(name, 0.0) + clocks
    return Clocks(sum(phase.clocks for phase in phases), sum(phase.chain for phase in phases), units)


def time_of(phases: Sequence[Phase], chip: Chip, tasks: int, resident: int) -> Time:
    """Of a launch of so many tasks, where `resident` blocks fit a multiprocessor."""
    return predicted.time_of(summed(phases), chip.device, tasks, resident)
