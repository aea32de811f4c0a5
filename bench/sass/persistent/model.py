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
from typing import NamedTuple

from bench.sass.chips import SCHEDULERS, Chip
from bench.sass.emulation.clocks import Phase

__all__ = ["BEFORE", "GAP_SECONDS", "LAUNCH_SECONDS", "Time", "time_of"]

GAP_SECONDS = 2.2e-6  # from a launch's end to the next one's work, measured on an H200 within a graph
LAUNCH_SECONDS = GAP_SECONDS + 2.5e-6  # [A] of a launch by itself: the second part is of its ends
BEFORE = 2  # barriers before the program's first phase has begun


class Time(NamedTuple):
    """Clocks of the two bounds, the unit that `work` is of, and seconds."""

    latency: float
    work: float
    unit: str
    blocks: int  # on a multiprocessor
    seconds: float

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return "latency" if self.latency >= self.work else self.unit


def _busiest(phases: Sequence[Phase]) -> tuple[float, str]:
    """Clocks of one task, and whose they are."""
    units = {"issue": sum(phase.issued for phase in phases) / SCHEDULERS}
    for phase in phases:
        for name, clocks in phase.units.items():
            units[name] = units.get(name, 0.0) + clocks
    return max((clocks, name) for name, clocks in units.items())


def time_of(phases: Sequence[Phase], chip: Chip, tasks: int, resident: int) -> Time:
    """Of a launch of so many tasks, where `resident` blocks fit a multiprocessor."""
    own = -(-tasks // chip.device.processors)
    blocks = max(1, min(resident, own))
    rounds = -(-own // blocks)
    chain = sum(phase.clocks if blocks == 1 else phase.chain for phase in phases)
    busy, unit = _busiest(phases)
    latency, work = rounds * chain, own * busy
    seconds = LAUNCH_SECONDS + max(latency, work) / chip.device.hertz
    return Time(latency, work, unit, blocks, seconds)
