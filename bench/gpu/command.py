"""``python -m bench gpu``: from a bare checkout to a table of measurements beside their predictions, in one command.

Build where nothing is built, test on the GPU, then measure step by step (``bench.gpu.plan``), each step in a process of
its own: a kernel that faults or hangs costs its own row and no other. All of it within the minutes that were given; a
run that is killed keeps what it had. No speed is measured where a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu import ready
from bench.gpu.plan import CUDA, Step, steps
from bench.gpu.rows import GpuRecord, line
from bench.providers.base import is_ours
from bench.report import record

FAULT, TIMING = 3, "timing"  # as bench.gpu.step has them, which cannot be imported before the package is built
LEAST_SECONDS = 15.0
"""Less is not enough to start a process and time anything."""
MOST_SECONDS = {"quick": 75.0, "slow": 180.0}
"""Of one step: one that compiles without end must not take the others' time."""
NEEDED = "gpu: needs an NVIDIA GPU that PyTorch can use; --dry-run prints what it would measure, with predictions"


@dataclass
class Budget:
    """Seconds that are left."""

    minutes: float
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes: expected a number > 0, got {self.minutes:g}")

    @property
    def left(self) -> float:
        """Until the minutes are over; negative afterwards."""
        return self.start + 60 * self.minutes - time.monotonic()


def _environment() -> dict[str, str]:
    """Of a step: JAX is not to take three quarters of the memory at once."""
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def command(step: Step, out: Path, without: Iterable[str]) -> list[str]:
    """The process of one step."""
    words = [sys.executable, "-m", "bench", "gpu", "--step", step.name, "--out", str(out)]
    excluded = ",".join(without)
    return [*words, "--without", excluded] if excluded else words


def _lost(step: Step, out: Path, provider: str, why: str) -> None:
    """A row for what ended a process."""
    row = GpuRecord(step.workload, provider, "failed", note=why, turn=step.turn, device="cuda")
    record.write_csv(out / "results.csv", [row], append=True)
    print(line(row), flush=True)


def _process(step: Step, out: Path, without: Sequence[str], seconds: float) -> str:
    """Run a step; "" where it ended well, else why it did not."""
    process = subprocess.Popen(command(step, out, without), cwd=ready.ROOT, env=_environment())
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        process.kill()  # nothing where it has ended
        process.wait()
    if status == 0:
        return ""
    return "the device gave up" if status == FAULT else f"exit status {status}"


def suspects(step: Step, at: str, without: Sequence[str]) -> list[str]:
    """Whom to leave out when a process ended at ``at``. In turn with the others ours are it: peers' kernels are old."""
    left = [p for p in step.providers if p not in without]
    if at == TIMING:
        return [p for p in left if is_ours(p)]
    return [at] if at in left else []


def run_step(step: Step, out: Path, budget: Budget, refused: Mapping[str, str] | None = None) -> None:
    """A step, and again without whatever ended its process, while there is time.

    refused: providers that are not run at all, and why.
    """
    without: list[str] = []
    for provider, why in (refused or {}).items():
        if provider in step.providers:
            _lost(step, out, provider, why)
            without.append(provider)
    now = out / "now"
    while len(without) < len(step.providers):
        seconds = min(budget.left, MOST_SECONDS[step.turn])
        if seconds < LEAST_SECONDS:
            rest = [p for p in step.providers if p not in without]
            rows = [GpuRecord(step.workload, p, "skipped", note="no time left", turn=step.turn) for p in rest]
            record.write_csv(out / "results.csv", rows, append=True)
            print(f"{step.workload:20s} {step.turn}: skipped, no time left", flush=True)
            return
        now.unlink(missing_ok=True)
        why = _process(step, out, without, seconds)
        if not why:
            return
        at = now.read_text() if now.exists() else ""
        blamed = suspects(step, at, without)
        for provider in blamed or [at or "all"]:
            _lost(step, out, provider, why + (" while all were timed in turn" if at == TIMING else ""))
        if not blamed:
            return  # not a provider's doing: again would be the same
        without += blamed


def latest(rows: Iterable[GpuRecord]) -> list[GpuRecord]:
    """The last row of each provider in each turn."""
    return list({(r.workload, r.turn, r.provider): r for r in rows}.values())


def run(out: Path, minutes: float, workloads: Sequence[str]) -> int:
    """The whole command. 0 where our rows are right, 1 where the tests or one of them failed."""
    chosen = list(steps(workloads))
    if not torch.cuda.is_available():
        raise ValueError(NEEDED)
    budget = Budget(minutes)
    out.mkdir(parents=True, exist_ok=True)
    for what, stage in (("build", ready.build), ("tests", lambda seconds: ready.gate(out, seconds))):
        done = stage(budget.left)
        print(f"{what}: {done.why} ({budget.left:.0f} s left)", flush=True)
        if not done.ok:
            print(f"{done.tail()}\nbench: nothing was measured: {done.why}", file=sys.stderr)
            return 1
    refused = refused_by_cuda_gate(out, budget) if any(CUDA in step.providers for step in chosen) else {}
    (out / "results.csv").unlink(missing_ok=True)
    for step in chosen:
        run_step(step, out.resolve(), budget, refused)
    return finish(out, budget)


def refused_by_cuda_gate(out: Path, budget: Budget) -> dict[str, str]:
    """``mtml:cuda`` where the tests of its kernels fail: a process of their own, so that a fault there takes no row of
    the others with it. Where none of them ran, the provider itself says why it cannot."""
    done = ready.gate(out, min(budget.left, MOST_SECONDS["slow"]), ready.CUDA, "gate-cuda")
    print(f"tests of backend cuda: {done.why} ({budget.left:.0f} s left)", flush=True)
    if done.ok or done.why.startswith(ready.NONE_RAN):
        return {}
    print(done.tail(), file=sys.stderr)
    return {CUDA: done.why}


def finish(out: Path, budget: Budget) -> int:
    """The second predictions, summary and plots of what was measured."""
    from bench.gpu import compiled, summary

    every = compiled.predicted(record.read_rows(out / "results.csv", GpuRecord), out, lambda: budget.left)
    record.write_csv(out / "results.csv", every)
    rows = latest(every)
    for text in summary.lines(rows):
        print(text)
    for path in summary.plots(rows, out):
        print(f"wrote {path}")
    print(f"wrote {out / 'results.csv'}")
    return 1 if summary.wrong(rows) else 0
