"""Was the machine quiet? How much of the processors that we may use other processes took while something was timed.

From Linux's /proc: what /proc/stat counts as busy (time that a hypervisor stole is no less lost), less the time of this
process and of those named as part of the measurement. Not known elsewhere, and where it counts less than we used.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
QUIET = 0.1
"""Of a core: what other processes may take of a quiet machine."""
LEAST_SECONDS = 1.0
"""Busy time is counted in ticks of 10 ms: of a shorter interval, a tenth of a core is a handful."""
IDLE_FIELDS = (3, 4)  # idle, iowait
FIELDS = 8  # user nice system idle iowait irq softirq steal; what follows is part of user and nice


def busy_ticks(stat: str, cpus: Iterable[int]) -> int:
    """Of these processors, by the text of /proc/stat.

    >>> busy_ticks("cpu  9 9 9 9 9 9 9 9\\ncpu0 1 2 3 50 60 4 5 6 7 8\\ncpu1 1 0 0 9 0 0 0 0", [0])
    21
    """
    wanted, total = {f"cpu{cpu}" for cpu in cpus}, 0
    for line in stat.splitlines():
        name, *values = line.split()
        if name in wanted:
            total += sum(int(v) for i, v in enumerate(values[:FIELDS]) if i not in IDLE_FIELDS)
    return total


def process_ticks(stat: str) -> int:
    """User and system time, by the text of /proc/PID/stat; a name in brackets, which may hold spaces, stands before."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _own_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Watch:
    """Counts from the moment it is made. ``known``: processes that belong to the measurement and run until its end."""

    def __init__(self, known: Iterable[int] = ()) -> None:
        self.known = tuple(known)
        self.start = self._reading()

    def _reading(self) -> tuple[float, float, float]:
        """Seconds: of the clock, busy, and our own; busy is NaN where there is no such count."""
        now = time.monotonic()
        try:
            tick, cpus = os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0)
            busy = busy_ticks((PROC / "stat").read_text(), cpus) / tick
            known = sum(process_ticks((PROC / str(pid) / "stat").read_text()) for pid in self.known) / tick
        except (AttributeError, OSError):
            return now, math.nan, math.nan
        return now, busy, _own_seconds() + known

    def cores(self) -> float:
        """How many processors' time others took since; NaN where that is not known."""
        seconds, busy, own = (b - a for a, b in zip(self.start, self._reading(), strict=True))
        if seconds < LEAST_SECONDS or not busy >= own / 2:
            return math.nan
        return max(busy - own, 0.0) / seconds


def warning(what: str, cores: float) -> list[str]:
    """One line where the machine was not quiet."""
    if not cores > QUIET:
        return []
    return [
        f"{what}: the machine was not quiet: while this was timed, other processes took {cores:.2f} of a core "
        f"(quiet: at most {QUIET}); repeat it alone"
    ]
