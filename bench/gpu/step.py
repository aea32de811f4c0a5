"""One step of ``python -m bench gpu``: gate and time a workload's providers on the GPU, in this process.

Rows go to the CSV as they come. Before it begins with a provider, a step writes its name into a file: where the process
dies, the caller knows of what, and starts it again without that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu import losses
from bench.gpu.clock import Clock, CudaClock, device_time, kernels
from bench.gpu.kernels import write_kernels
from bench.gpu.multihead_loss import CASES
from bench.gpu.multihead_loss import peak as peak_memory
from bench.gpu.plan import CUDA, Step
from bench.gpu.precision import full_precision
from bench.gpu.rows import GpuRecord, line
from bench.gpu.work import Work, device_here, of_losses, of_meta_step, rates
from bench.measure import peak, runner, timing
from bench.providers import is_ours
from bench.report import record
from bench.workloads import WORKLOADS
from mtml_kernels.schedule.devices import DEVICES

FAULT = 3
"""Exit status of a process whose device answers nothing any more."""
TIMING = "timing"
"""What a process is at while all providers run in turn."""
Run = Callable[[], Any]
UNSEEN = ("jax",)
"""Providers on streams of their own: PyTorch's events and profiler do not see them."""


@dataclass(frozen=True)
class Place:
    """Where results go, and what is measured with."""

    out: Path
    clock: Clock
    device: str = "cuda"
    wall_seconds: float = 1.0
    device_seconds: float = 0.3

    @property
    def results(self) -> Path:
        """All rows of a run."""
        return self.out / "results.csv"

    def begin(self, what: str) -> None:
        """What this process is at."""
        (self.out / "now").write_text(what)

    def write(self, row: GpuRecord) -> None:
        """Add a row to the results and print it."""
        record.write_csv(self.results, [row], append=True)
        print(line(row), flush=True)


class Fault(RuntimeError):
    """The device answers nothing any more: whatever this process would measure next would fail too."""


def _alive(place: Place, provider: str) -> None:
    try:
        place.clock.synchronize()
    except RuntimeError as error:
        raise Fault(f"{provider}: {error}") from error


def _meta_step(step: Step, place: Place) -> Iterator[tuple[Run | None, record.Record]]:
    options = runner.Options(step.providers, threads=torch.get_num_threads(), device=place.device)
    w = WORKLOADS[step.workload]
    place.begin("")
    gate = runner.gate_for(w, options)
    for provider in step.providers:
        place.begin(provider)
        prepared, row = runner.admit(w, provider, options, gate)
        yield (None if prepared is None else prepared.run), row


def _losses(case: str, step: Step, place: Place) -> Iterator[tuple[Run | None, record.Record]]:
    place.begin("")
    admission = losses.Admission(case, CASES[case], losses.DTYPE, place.device)
    for provider in step.providers:
        place.begin(provider)
        run, row = admission.admit(provider)
        yield run, replace(row, workload=step.workload)


def admitted(step: Step, place: Place) -> tuple[dict[str, Run], dict[str, GpuRecord]]:
    """The providers that match, and their rows so far; the rows of the others are written at once."""
    runs, rows = dict[str, Run](), dict[str, GpuRecord]()
    found = _losses(step.loss, step, place) if step.loss else _meta_step(step, place)
    for run, plain in found:
        row = GpuRecord(**asdict(plain), turn=step.turn)
        row = replace(row, **record.environment(place.device))
        if run is None:
            place.write(row)
            _alive(place, row.provider)
        else:
            runs[row.provider], rows[row.provider] = run, row
    return runs, rows


def _work(step: Step) -> Work:
    device, name = device_here()
    known = DEVICES["h200"] if device is None else device
    found = of_losses(step.loss, losses.DTYPE, known) if step.loss else of_meta_step(WORKLOADS[step.workload], known)
    if device is None:
        print(f"no numbers of {name} are known: nothing is predicted for it", flush=True)
        return found._replace(seconds=float("nan"), calls=0)
    return found


def _by_schedule(provider: str) -> bool:
    """Whether the calls that are predicted are those that run: `mtml:cuda` makes one launch of them all."""
    return is_ours(provider) and provider != CUDA


def _on_device(row: GpuRecord, run: Run, work: Work, place: Place) -> GpuRecord:
    """The row with what the device says."""
    if row.provider.partition(":")[0] in UNSEEN:
        return row
    hot = device_time(run, place.clock, cold=False, seconds=place.device_seconds)
    cold = device_time(run, place.clock, cold=True, seconds=place.device_seconds)
    row = replace(row, hot_ms=hot.ms, hot_iqr_ms=hot.iqr_ms, cold_ms=cold.ms, cold_iqr_ms=cold.iqr_ms)
    tflops, tbs = rates(work, hot.ms)
    row = replace(row, tflops=tflops, tbs=tbs, peak_mib=peak_memory(run, place.device))
    ran = kernels(run) if place.device == "cuda" else []
    if ran:
        row = replace(row, kernel_ms=sum(k.us for k in ran) / 1e3, launches=len(ran))
        write_kernels(place.out, row, ran, work.schedule if _by_schedule(row.provider) else None)
    return row


def _on_the_wall(row: GpuRecord, t: timing.Timing, work: Work, best: peak.Peak) -> GpuRecord:
    row = replace(row, ms=t.ms, best_ms=t.best_ms, iqr_ms=t.iqr_ms, n=t.n, mbytes=work.bytes / 1e6)
    rate = work.flops / t.ms / 1e6
    row = replace(row, gflop=work.flops / 1e9, gflops=rate, gbs=work.bytes / t.ms / 1e6)
    row = replace(row, share_of_peak=rate / best.gflops, peak_gflops=best.gflops, peak_source=best.source)
    if _by_schedule(row.provider):
        row = replace(row, predicted_ms=1e3 * work.seconds, predicted_launches=work.calls)
    return row


def _timed(runs: Mapping[str, Run], place: Place) -> dict[str, timing.Timing]:
    place.begin(TIMING)
    try:
        return timing.interleave(runs, place.wall_seconds, place.device)
    except RuntimeError as error:
        raise Fault(f"timing: {error}") from error


def measure(step: Step, place: Place) -> None:
    """Gate and time one step. Raises Fault where the device gave up."""
    runs, rows = admitted(step, place)
    work = _work(step)
    best = peak.measure(losses.DTYPE if step.loss else torch.float32, 1, place.device)
    times = _timed(runs, place)
    for name, run in runs.items():
        place.begin(name)
        row = _on_the_wall(rows[name], times[name], work, best)
        try:
            row = _on_device(row, run, work, place)
        except RuntimeError as error:
            place.write(replace(row, note=f"no device time: {str(error).strip()[:200]}"))
            _alive(place, name)
        else:
            place.write(row)
    place.begin("")


def main(step: Step, out: Path) -> int:
    """The process of one step."""
    try:
        with full_precision():
            measure(step, Place(out, CudaClock()))
    except Fault as error:
        print(f"the device gave up: {error}", flush=True)
        return FAULT
    with contextlib.suppress(OSError):
        (out / "now").unlink()
    return 0
