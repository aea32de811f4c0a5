"""Time on a device: CUDA events with hot and cold L2, and the kernels one by one.

Between a call's two events no time of the host is to pass: the device is held up first, for as long as the host needs
to hand the whole call over, and then finds all its kernels waiting. A call that takes the host longer than
LONGEST_HOLD, or that waits for the device itself, is measured with its gaps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from bench.measure.timing import Timing, summary

Run = Callable[[], Any]
LONGEST_HOLD = 0.02
FEWEST, MOST = 5, 200


class Clock(Protocol):
    """What a device must be able to do to be timed."""

    def mark(self) -> Any:
        """A point in the device's queue, now."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two points that the device has passed."""

    def synchronize(self) -> None:
        """Wait until the queue is empty."""

    def flush(self) -> None:
        """Put work into the queue after which nothing of before is in the L2 cache."""

    def hold(self, seconds: float) -> None:
        """Put work into the queue that takes this long and touches nothing."""


class CudaClock:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(4 * int(getattr(properties, "L2_cache_size", 0)), 256 << 20)
        self._waste = torch.empty(size, dtype=torch.int8, device="cuda")
        self._cycles_a_second = self._calibrate(10_000_000)

    def _calibrate(self, cycles: int) -> float:
        torch.cuda._sleep(cycles)  # the first one loads it
        start = self.mark()
        torch.cuda._sleep(cycles)
        end = self.mark()
        self.synchronize()
        return cycles / self.milliseconds(start, end) * 1e3

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._waste.zero_()

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles_a_second))


def host_seconds(run: Run, clock: Clock, calls: int = 3) -> float:
    """How long the host takes to hand one call over: the median, each with an empty queue before it."""
    taken = []
    for _ in range(calls):
        clock.synchronize()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    clock.synchronize()
    return statistics.median(taken)


def device_time(run: Run, clock: Clock, *, cold: bool, seconds: float) -> Timing:
    """The device's time of a call, of FEWEST to MOST calls in about ``seconds``."""
    ahead = min(1.5 * host_seconds(run, clock), LONGEST_HOLD)
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() < stop):
        if cold:
            clock.flush()
        clock.hold(ahead)
        start = clock.mark()
        run()
        end = clock.mark()
        clock.synchronize()
        found.append(clock.milliseconds(start, end) / 1e3)
    return summary(found)


class Kernel(NamedTuple):
    """One kernel, copy or fill that a call started."""

    name: str
    us: float


def in_order(events: Iterable[Any]) -> Iterator[Kernel]:
    """What ran on the device, of a profiler's events, by the time at which it started; no ranges that were named."""
    on_device = [e for e in events if str(getattr(e, "device_type", "")).endswith("CUDA")]
    ran = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
    for e in sorted(ran, key=lambda e: e.time_range.start):
        yield Kernel(e.name, float(e.time_range.elapsed_us()))


def kernels(run: Run, calls: int = 3) -> list[Kernel]:
    """The kernels of one call; of several that were profiled the one whose times add up to the least.

    Empty where this process may not profile the device, or where a call starts none that PyTorch's profiler sees.
    """
    best: list[Kernel] = []
    for _ in range(calls):
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        try:
            with torch.profiler.profile(activities=activities) as profiler:
                run()
                torch.cuda.synchronize()
        except RuntimeError:
            return []
        found = list(in_order(profiler.events() or ()))
        if found and (not best or sum(k.us for k in found) < sum(k.us for k in best)):
            best = found
    return best
