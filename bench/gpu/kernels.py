"""The kernels of one call, one a line; of ours each beside the call of the schedule that it should be."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.clock import Kernel
from bench.gpu.rows import GpuRecord
from mtml_kernels.schedule.describe import Description

COLUMNS = ("kernel", "us", "call", "predicted_us", "bound", "gflop", "mbytes")


def table(ran: Sequence[Kernel], schedule: Description | None) -> list[tuple[str, ...]]:
    """Rows of COLUMNS. Calls stand beside kernels where there are as many of them: a kernel each, in order."""
    paired = schedule is not None and len(schedule.lines) == len(ran)
    rows = []
    for index, kernel in enumerate(ran):
        row: tuple[str, ...] = (kernel.name, f"{kernel.us:.2f}")
        if paired and schedule is not None:
            line = schedule.lines[index]
            us, bound = 1e6 * line.predicted.seconds, line.predicted.bound
            work = f"{line.cost.flops / 1e9:.6g}", f"{line.cost.bytes / 1e6:.6g}"
            row += (f"{line.where}: {line.name}", f"{us:.2f}", bound, *work)
        rows.append(row + ("",) * (len(COLUMNS) - len(row)))
    return rows


def write_kernels(out: Path, row: GpuRecord, ran: Sequence[Kernel], schedule: Description | None) -> Path:
    """The table as ``kernels-WORKLOAD-PROVIDER.csv``."""
    path = out / f"kernels-{row.workload}-{row.provider.replace(':', '-')}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(table(ran, schedule))
    return path
