"""``python -m bench host``: host time of one meta-step, the part of forward + backward spent outside native code.

The compiled module adds up the seconds spent inside its calls; what the wall clock counts beyond that is Python,
PyTorch's autograd and the checks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.measure import timing
from bench.measure.runner import prepare
from bench.providers import Unavailable
from bench.workloads import select


@dataclass(frozen=True)
class HostTime:
    """Microseconds of one meta-step, medians of ``n`` bursts: all of it, inside native code, and the difference."""

    wall_us: float
    native_us: float
    host_us: float
    n: int


def native_clock() -> Callable[[], float]:
    """The compiled module's cumulative seconds. Raises Unavailable where it is not built or does not count."""
    try:
        from mtml_kernels import native

        clock: Callable[[], float] = native.native_seconds
        clock()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Unavailable(
            f"no clock inside native code ({error}): build the compiled module with `pip install -e .`"
        ) from error
    return clock


def measure(workload: str, threads: int, seconds: float = 2.0, provider: str = "mtml") -> HostTime:
    """Host time of one meta-step of a workload."""
    clock = native_clock()
    torch.set_num_threads(threads)
    step = prepare(select([workload])[0], provider, torch.float32, "cpu")
    step.run()
    count = timing.calibrate(step.run)
    wall: list[float] = []
    native: list[float] = []
    stop = time.perf_counter() + seconds
    while not wall or time.perf_counter() < stop:
        before = clock()
        wall.append(timing.burst(step.run, count) / count * 1e6)
        native.append((clock() - before) / count * 1e6)
    host = statistics.median(a - b for a, b in zip(wall, native, strict=True))
    return HostTime(statistics.median(wall), statistics.median(native), host, len(wall))
