"""Interleaved timing: bursts of at least 20 ms, providers in turn, medians.

A drifting machine then slows all providers alike, none runs on another's cold caches only, and a single burst is long
beside the clock's and the scheduler's grain.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BURST_SECONDS = 0.02
Run = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, best and interquartile range of ``n`` bursts of ``count`` calls."""

    ms: float
    best_ms: float
    n: int
    count: int
    iqr_ms: float


def spread(values: Sequence[float]) -> float:
    """The interquartile range; NaN of fewer than four values, whose quarters say nothing.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    2.0
    """
    if len(values) < 4:
        return math.nan
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def summary(seconds: Sequence[float], count: int = 1) -> Timing:
    """Of the seconds that one call took in each of several bursts of ``count`` calls."""
    ms = [1e3 * s for s in seconds]
    return Timing(statistics.median(ms), min(ms), len(ms), count, spread(ms))


def burst(run: Run, count: int, device: str = "cpu", clock: Clock | None = None) -> float:
    """Seconds that ``count`` calls take together. Garbage collection waits until they are done."""
    clock, collecting = clock or time.perf_counter, gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in range(count):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def calibrate(run: Run, device: str = "cpu", seconds: float = BURST_SECONDS, clock: Clock | None = None) -> int:
    """How many calls make a burst of at least ``seconds``; warms the provider up on the way."""
    count = 1
    while True:
        elapsed = burst(run, count, device, clock)
        if elapsed >= seconds:
            return count
        count = max(count + 1, min(math.ceil(count * 1.2 * seconds / max(elapsed, 1e-7)), count * 100))


def interleave(
    runs: Mapping[str, Run], seconds: float, device: str = "cpu", min_rounds: int = 3, max_rounds: int = 400,
    clock: Clock | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Time all runs in turn, A B C A B C, for about ``seconds`` each.

    At least ``min_rounds`` rounds, unless a round is so slow that the whole budget would be exceeded fourfold. clock:
    ``time.thread_time`` for what one thread does from beginning to end beside other work; the wall's where it is None.
    """
    counts = {name: calibrate(run, device, clock=clock) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    budget, rounds = seconds * len(runs), 0
    gc.collect()
    gc.freeze()  # the collections between rounds then look at the providers' garbage alone
    start = time.perf_counter()
    while runs and rounds < max_rounds:
        for name, run in runs.items():
            times[name].append(burst(run, counts[name], device, clock) / counts[name])
        gc.collect()
        rounds += 1
        spent = time.perf_counter() - start
        if spent > 4 * budget or (spent > budget and rounds >= min_rounds):
            break
    gc.unfreeze()
    return {name: summary(v, counts[name]) for name, v in times.items()}
