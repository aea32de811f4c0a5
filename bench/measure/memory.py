"""``python -m bench memory``: peak memory of one meta-step at several numbers of inner steps, against the peers'.

Each figure comes from a process of its own. It warms the provider up on a single task and a single step (libraries
load, thread pools start), gives free pages back, resets the high-water mark of its resident memory, and runs one
meta-step: the figure is the high-water mark less what was resident before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.measure.runner import prepare
from bench.workloads import Workload
from bench.workloads.inner import InnerWorkload

PROVIDERS = ("mtml", "loop", "mixflow", "mixflow:loop")
"""Ours, the graph of all steps, and the peer that keeps none either, with all tasks' parameters or with one's."""


@dataclass(frozen=True)
class Usage:
    """Peak memory of one meta-step above what was resident before it; ``error`` says why there is none."""

    workload: str
    provider: str
    steps: int
    megabytes: float
    error: str = ""


def default(w: Workload) -> tuple[str, ...]:
    """What is measured when nothing is asked for: mixflow has the meta-steps of plain gradient descent alone."""
    return tuple(p for p in PROVIDERS if not p.startswith("mixflow") or not isinstance(w, InnerWorkload))


def _status(field: str) -> float:
    """A field of /proc/self/status in megabytes; NaN where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def _reset() -> float:
    """Give free pages back, reset the high-water mark, and return the megabytes resident now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no reset: the old mark is the best baseline there is
        return high_water()
    return _status("VmRSS")


def high_water() -> float:
    """The process's peak resident memory in megabytes."""
    mark = _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return mark if mark == mark else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_here(w: Workload, provider: str, threads: int) -> float:
    """Megabytes one meta-step takes at its peak, in this process, which should have done nothing else before."""
    torch.set_num_threads(threads)
    prepare(replace(w, tasks=1, steps=1), provider, torch.float32, "cpu").run()
    step = prepare(w, provider, torch.float32, "cpu")
    baseline = _reset()
    step.run()
    return high_water() - baseline


def measure(workload: str, provider: str, steps: int, threads: int, timeout: float = 600.0) -> Usage:
    """The same in a process of its own."""
    options = {"--steps": steps, "--providers": provider, "--threads": threads}
    words = [
        sys.executable,
        "-m",
        "bench",
        "memory",
        workload,
        "--here",
        *(str(x) for kv in options.items() for x in kv),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2])
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Usage(workload, provider, steps, float("nan"), reason)
    return Usage(workload, provider, steps, json.loads(done.stdout.splitlines()[-1]))


def report(workload: str, steps: Iterable[int], providers: Iterable[str], threads: int) -> list[Usage]:
    """Measure and print every combination; the last column is the multiple of the first provider's memory."""
    usages, names = [], list(providers)
    for count in steps:
        first = float("nan")
        for name in names:
            usage = measure(workload, name, count, threads)
            first = usage.megabytes if name == names[0] else first
            usages.append(usage)
            said = usage.error or f"{usage.megabytes:10.1f} MB  {usage.megabytes / first:6.2f} x {names[0]}"
            print(f"{workload:20s} {count:4d} steps  {name:14s} {said}", flush=True)
    return usages
