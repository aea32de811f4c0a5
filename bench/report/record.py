"""Records: one CSV row for each workload and provider of a run, with all that is needed to judge the number."""

from __future__ import annotations

import csv
import datetime
import functools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.providers.base import is_ours

ROOT = Path(__file__).resolve().parents[2]
NAN = math.nan
R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Record:
    """One row. ``status``: ok, mismatch, skipped or failed; numbers that do not exist are NaN (empty in the CSV).

    other_load: cores that other processes took while the workload was timed.
    """

    workload: str
    provider: str
    status: str
    ms: float = NAN
    best_ms: float = NAN
    iqr_ms: float = NAN
    n: int = 0
    first_s: float = NAN
    match_error: float = NAN
    match_score: float = NAN
    gflop: float = NAN
    gflops: float = NAN
    share_of_peak: float = NAN
    gbs: float = NAN
    peak_gflops: float = NAN
    peak_source: str = ""
    threads: int = 0
    dtype: str = ""
    device: str = "cpu"
    machine: str = ""
    isa: str = ""
    other_load: float = NAN
    date: str = ""
    version: str = ""
    torch: str = ""
    sha: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes two rows of different runs comparable."""
        return self.workload, self.provider, self.dtype, self.device, self.threads


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _parse(kind: str, text: str) -> Any:
    if kind == "float":
        return float(text) if text else NAN
    return int(text or 0) if kind == "int" else text


def milliseconds(ms: float) -> str:
    """Three digits, and no exponent where a time is long."""
    return f"{float(f'{ms:.3g}'):g} ms"


def write_csv(path: str | os.PathLike[str], records: Iterable[Record], append: bool = False) -> None:
    """Write records of one kind (after those already there, with ``append``); the file is replaced in one step."""
    target, given = Path(path), list(records)
    kind = type(given[0]) if given else Record
    rows = [*(read_rows(target, kind) if append and target.exists() else []), *given]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(kind)])
        writer.writerows([_text(getattr(row, f.name)) for f in fields(kind)] for row in rows)
    part.replace(target)


def read_csv(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file; columns it does not have keep their defaults. Raises ValueError if it is no such CSV."""
    return read_rows(path, Record)


def read_rows(path: str | os.PathLike[str], kind: type[R]) -> list[R]:
    """The same as records of this kind; columns that it does not know are left out."""
    kinds = {f.name: str(f.type) for f in fields(kind)}
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"workload", "provider", "status"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}: expected a CSV written by `python -m bench run`, got columns {reader.fieldnames}"
            )
        if "busy" in set(reader.fieldnames or ()) - kinds.keys():
            raise ValueError(
                f"{path}: rows of `python -m bench contention`, several of each provider; expected those of "
                "`python -m bench run` (`readme --table contention` reads these)"
            )
        return [kind(**{k: _parse(kinds[k], v or "") for k, v in row.items() if k in kinds}) for row in reader]


def fastest_peer(records: Iterable[Record], workload: str) -> Record | None:
    """The fastest provider of a workload that is not this project's and passed the gate."""
    peers = [r for r in records if r.workload == workload and r.ok and not is_ours(r.provider)]
    return min(peers, key=lambda r: r.ms, default=None)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _isa() -> str:
    try:
        from mtml_kernels import native

        return str(native.info().get("isa", ""))
    except (ImportError, AttributeError, RuntimeError):
        return ""


def _version() -> str:
    try:
        from mtml_kernels import __version__
    except ImportError:
        return ""
    return __version__


@functools.cache
def _fixed(device: str) -> dict[str, str]:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {available_cpus()} CPUs"
    sha = (
        _command("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")
        if (ROOT / ".git").exists()
        else ""
    )
    python = ".".join(map(str, sys.version_info[:2]))
    return {
        "machine": machine,
        "isa": _isa(),
        "version": _version(),
        "torch": f"{torch.__version__} (Python {python})",
        "sha": sha,
    }


def available_cpus() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str = "cpu") -> dict[str, Any]:
    """The columns that describe where and when a run took place."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**_fixed(device), "device": device, "date": date, "threads": torch.get_num_threads()}
