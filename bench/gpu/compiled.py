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

from bench.gpu.kernels import COLUMNS
from bench.gpu.rows import GpuRecord
from bench.gpu.work import device_here, of_meta_step
from bench.workloads import WORKLOADS
from mtml_kernels.schedule.devices import DEVICES

__all__ = ["OURS", "Found", "predict", "predicted", "put_beside"]

ROOT = Path(__file__).resolve().parents[2]
OURS = "mtml:triton"
PRECISION = "fp32"  # as bench.gpu.precision has it for every provider
LEAST_SECONDS = 10.0
Found = dict[str, str]
"""A row of ``bench predict --sass --out``."""
Find = Callable[[str, str, Path, float], Found | None]
"""Of a workload, a device, a folder for what is told of every launch, and seconds."""
BESIDE = ("compiled_us", "compiled_bound")


def predict(workload: str, device: str, folder: Path, seconds: float) -> Found | None:
    """By another process; None, and why on standard output, where it fails or takes longer."""
    with tempfile.TemporaryDirectory() as elsewhere:
        out = Path(elsewhere) / "predicted.csv"
        options = ("--sass", "--device", device, "--precision", PRECISION, "--worst", "0")
        files = ("--launches", str(folder), "--out", str(out))
        command = (sys.executable, "-m", "bench", "predict", workload, *options, *files)
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


def _launches(out: Path, workload: str, device: str) -> Path:
    return out / f"launches-{workload}-{device}-{PRECISION}.csv"


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def put_beside(kernels: Path, launches: Path) -> bool:
    """Two more columns for the table of the kernels that ran: what was predicted for each of ours.

    They are found by name and order, for copies and PyTorch's own kernels run between them. Whether all were found:
    otherwise the table is left as it is.
    """
    if not (kernels.exists() and launches.exists()):
        return False
    ran, told = _read(kernels), [row for row in _read(launches) if not row["kernel"].startswith("torch ")]
    names = {row["kernel"] for row in told}
    ours = [row for row in ran if row["kernel"] in names]
    if [row["kernel"] for row in ours] != [row["kernel"] for row in told]:
        return False
    for row, own in zip(ours, told, strict=True):
        row |= {"compiled_us": own["us"], "compiled_bound": own["bound"]}
    with kernels.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *BESIDE], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ran)
    return True


def predicted(rows: Iterable[GpuRecord], out: Path, left: Callable[[], float], find: Find = predict) -> list[GpuRecord]:
    """The rows, ours of backend `triton` with what its compiled kernels should take; `left`: seconds until the end."""
    found, done = list[GpuRecord](), dict[str, Found | None]()
    for row in rows:
        device = _device(row)
        if device is not None:
            if row.workload not in done and left() > LEAST_SECONDS:
                done[row.workload] = find(row.workload, device, out, left())
                put_beside(out / f"kernels-{row.workload}-mtml-triton.csv", _launches(out, row.workload, device))
            own = done.get(row.workload)
            if own is not None:
                row = replace(row, compiled_ms=float(own["us"]) / 1e3, compiled_launches=int(own["launches"]))
        found.append(row)
    return found
