"""The second prediction of rows that were timed: of our kernels as they are compiled for this GPU.

Made last, in processes of their own, in what time is left: a kernel takes a second, and rows stand without it.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from bench.gpu.rows import GpuRecord
from bench.gpu.work import device_here, of_meta_step
from bench.workloads import WORKLOADS
from mtml_kernels.schedule.devices import DEVICES

__all__ = ["OURS", "Found", "predict", "predicted"]

ROOT = Path(__file__).resolve().parents[2]
OURS = "mtml:triton"
PRECISION = "fp32"  # as bench.gpu.precision has it for every provider
LEAST_SECONDS = 10.0
Found = dict[str, str]
"""A row of ``bench predict --sass --out``."""


def predict(workload: str, device: str, seconds: float) -> Found | None:
    """By another process; None, and why on standard output, where it fails or takes longer."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predicted.csv"
        options = ("--sass", "--device", device, "--precision", PRECISION, "--worst", "0", "--out", str(out))
        command = (sys.executable, "-m", "bench", "predict", workload, *options)
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        try:
            subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{workload}: not predicted from its kernels: no time left", flush=True)
            return None
        except subprocess.CalledProcessError as error:
            print(f"{workload}: not predicted from its kernels: {error.stderr.strip()[-500:]}", flush=True)
            return None
        with out.open(newline="") as file:
            return next(csv.DictReader(file))


def _device(row: GpuRecord) -> str | None:
    """Among `DEVICES` the GPU of a row whose kernels are a schedule's; None of any other row."""
    if row.provider != OURS or not row.ok or not row.predicted_launches or row.workload not in WORKLOADS:
        return None
    here, _ = device_here()
    if here is None or of_meta_step(WORKLOADS[row.workload], here).schedule is None:
        return None
    return next(name for name, device in DEVICES.items() if device is here)


def predicted(
    rows: Iterable[GpuRecord],
    left: Callable[[], float],
    find: Callable[[str, str, float], Found | None] = predict,
) -> list[GpuRecord]:
    """The rows, ours of backend `triton` with what its compiled kernels should take; `left`: seconds until the end."""
    found, done = list[GpuRecord](), dict[str, Found | None]()
    for row in rows:
        device = _device(row)
        if device is not None:
            if row.workload not in done and left() > LEAST_SECONDS:
                done[row.workload] = find(row.workload, device, left())
            own = done.get(row.workload)
            if own is not None:
                row = replace(row, compiled_ms=float(own["us"]) / 1e3, compiled_launches=int(own["launches"]))
        found.append(row)
    return found
