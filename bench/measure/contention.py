"""``python -m bench contention``: a meta-step on a machine that others use, at several numbers of threads.

Calls are timed one by one: what a busy core costs shows in the slowest of them, which a burst would average away.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import load, runner, timing
from bench.measure.busy import busy
from bench.providers import OWN, Prepared
from bench.report.contention import Contended, line, rated
from bench.report.record import Record, environment
from bench.workloads import Workload, select

PROVIDERS = (OWN, "loop")
CALLS = 200
BLOCK_SECONDS = 0.1
SETTLE_SECONDS = 0.005
"""Untimed calls after a change of threads: the pool grows or shrinks, and threads of the last call fall asleep."""
Turn = tuple[int, str]
"""Threads, provider."""
Admitted = Mapping[str, tuple[Prepared, Record]]


@dataclass(frozen=True)
class Options:
    """What was asked for. ``seconds``: for each number of busy processes, number of threads and provider."""

    busy: tuple[int, ...] = (0, 1, 2)
    threads: tuple[int, ...] = (1, 2)
    providers: tuple[str, ...] = PROVIDERS
    seconds: float = 4.0

    def check(self) -> None:
        """Raises ValueError for what cannot be measured in one process."""
        for name, values, least in (("busy", self.busy, 0), ("threads", self.threads, 1)):
            if not values or len(set(values)) != len(values) or min(values) < least:
                raise ValueError(f"{name}: expected different whole numbers >= {least}, as 1,2; got {values}")
        if len(self.threads) > 1 and any(p.partition(":")[0] == "jax" for p in self.providers):
            raise ValueError(
                "providers: jax keeps the number of threads that it starts with; expected one number in threads, got "
                f"{self.threads}: call once for each"
            )


def percentile_99(values: Sequence[float]) -> float:
    """NaN of fewer than 100 values, of which none is the slowest in a hundred.

    >>> round(percentile_99(range(1, 102)))
    100
    """
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) >= 100 else math.nan


def _block(run: timing.Run, seconds: float) -> list[float]:
    """Seconds of each call, for so long and at least one."""
    found, stop = list[float](), time.perf_counter() + seconds
    while not found or time.perf_counter() < stop:
        found.append(timing.burst(run, 1))
    return found


def in_turn(runs: Mapping[Turn, timing.Run], seconds: float, calls: int = CALLS) -> dict[Turn, list[float]]:
    """Seconds of each call, in blocks in turn with the threads of each, for about ``seconds`` each.

    At least so many calls, unless the whole budget would be exceeded fourfold. Torch's number of threads is put back.
    """
    times: dict[Turn, list[float]] = {turn: [] for turn in runs}
    budget, threads = seconds * len(runs), torch.get_num_threads()
    start = time.perf_counter()
    gc.collect()
    gc.freeze()  # the collections between rounds then look at the providers' garbage alone
    try:
        while runs:
            for turn, run in runs.items():
                torch.set_num_threads(turn[0])
                _block(run, SETTLE_SECONDS)
                times[turn] += _block(run, min(BLOCK_SECONDS, seconds))
            gc.collect()
            spent = time.perf_counter() - start
            if spent > 4 * budget or (spent > budget and min(map(len, times.values())) >= calls):
                break
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    return times


def _judged(w: Workload, options: Options, say: runner.Say) -> tuple[Admitted, list[Record]]:
    """The providers that match, by the gate of ``bench run``, and the records of those that cannot be timed."""
    asked = runner.Options(options.providers)
    gate, admitted, others = runner.gate_for(w, asked), dict[str, tuple[Prepared, Record]](), list[Record]()
    for name in options.providers:
        prepared, record = runner.admit(w, name, asked, gate)
        if prepared is None:
            say(f"{w.name:20s} {name:14s} {record.status}: {record.note}")
            others.append(record)
        else:
            admitted[name] = prepared, record
    return admitted, others


def _row(record: Record, seconds: Sequence[float], **where: Any) -> Contended:
    """What the gate recorded, with the times of the calls and where they were taken."""
    t = timing.summary(seconds)
    times = {"ms": t.ms, "best_ms": t.best_ms, "iqr_ms": t.iqr_ms, "n": t.n}
    tail = {"mean_ms": 1e3 * statistics.fmean(seconds), "p99_ms": 1e3 * percentile_99(seconds)}
    return Contended(**vars(record) | times | tail | where)


def _beside(count: int, w: Workload, admitted: Admitted, o: Options, say: runner.Say) -> list[Contended]:
    """The rows of a number of busy processes."""
    runs = {(threads, name): admitted[name][0].run for threads, name in itertools.product(o.threads, admitted)}
    with busy(count) as pids:
        watch = load.Watch(pids)
        times = in_turn(runs, o.seconds)
        others = watch.cores()
    for text in load.warning(f"{w.name} beside {count} busy", others):
        say(text)
    where = environment() | {"busy": count, "other_load": others}
    return [_row(admitted[name][1], times[threads, name], **where | {"threads": threads}) for threads, name in times]


def run_workload(w: Workload, options: Options, say: runner.Say = print) -> list[Contended]:
    """Gate and time the providers of one workload."""
    torch.set_num_threads(max(options.threads))
    admitted, others = _judged(w, options, say)
    rows = [Contended(**vars(record)) for record in others]
    for count in options.busy if admitted else ():
        rows += _beside(count, w, admitted, options, say)
    for r in rated(rows):
        say(line(r))
    return rows


def run(names: Iterable[str], options: Options, say: Callable[[str], None] = print) -> list[Contended]:
    """Several workloads. Raises ValueError for an unknown workload, provider or number before anything is measured."""
    options.check()
    selected = select(names)
    runner.check_providers(options.providers)
    threads = torch.get_num_threads()
    try:
        return [row for w in selected for row in run_workload(w, options, say)]
    finally:
        torch.set_num_threads(threads)
