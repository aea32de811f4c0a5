"""Whether ``bench run`` notices that the machine was not quiet, and processes that are not to make it so."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.measure import load, peak, runner  # noqa: E402
from bench.measure.busy import busy  # noqa: E402
from bench.report import readme, record  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
STAT = "cpu 99 99 99 99 99 99 99 99 99 99\ncpu0 {user} 0 0 500 60 0 0 0 70 80\ncpu1 9999 0 0 0 0 0 0 0 0 0\nintr 1 2\n"


class Machine:
    """A made-up /proc, clock and time of this process, which may use cpu0 alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.own = folder, 100.0, 3.0
        self.set(busy=10.0, known=1.0)

    def set(self, busy: float, known: float) -> None:
        (self.folder / "stat").write_text(STAT.format(user=int(busy * TICK)))
        (self.folder / "7").mkdir(exist_ok=True)
        head = "7 (a ) name 1) R 1 7 7 0 -1 4194560 9 0 0 0"
        (self.folder / "7" / "stat").write_text(f"{head} {int(known * TICK)} 0 88 99 20 0 1\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path)
    monkeypatch.setattr(load, "PROC", tmp_path)
    monkeypatch.setattr(load.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(load, "_own_seconds", lambda: made.own)
    yield made


def after(machine: Machine, watch: load.Watch, seconds: float, busy: float, own: float, known: float = 0.0) -> float:
    """What a watch says when so much time has passed, and so much of it was taken."""
    machine.now += seconds
    machine.own += own
    machine.set(busy=10.0 + busy, known=1.0 + known)
    return watch.cores()


def test_ticks_of_the_processors_that_we_may_use() -> None:
    """Idle and iowait are not busy, guests are counted in user already, cpu1 is not cpu10."""
    stat = "cpu  9 9 9 9 9 9 9 9\ncpu1 1 2 3 50 60 4 5 6 7 8\ncpu10 1 0 0 9 0 0 0 0\nctxt 5\n"
    assert load.busy_ticks(stat, [1]) == 21 and load.busy_ticks(stat, [1, 10]) == 22
    assert load.process_ticks("7 (a ) b 1 2) S 1 7 7 0 -1 4194560 9 0 0 0 30 4 88 99 20 0 1") == 34


def test_others_are_what_is_busy_less_our_own(machine: Machine) -> None:
    assert after(machine, load.Watch(), 4.0, busy=6.0, own=4.0, known=1.2) == pytest.approx(0.5)


def test_known_processes_are_not_others(machine: Machine) -> None:
    assert after(machine, load.Watch([7]), 4.0, busy=6.0, own=4.0, known=1.2) == pytest.approx(0.2)


def test_rounding_never_makes_it_less_than_nothing(machine: Machine) -> None:
    assert after(machine, load.Watch(), 4.0, busy=3.9, own=4.0) == 0


@pytest.mark.parametrize(("seconds", "busy_seconds", "own"), [(0.5, 0.5, 0.2), (4.0, 0.0, 3.9)])
def test_not_known(machine: Machine, seconds: float, busy_seconds: float, own: float) -> None:
    """Of too short a time, and from a /proc/stat that does not even count ourselves."""
    assert math.isnan(after(machine, load.Watch(), seconds, busy_seconds, own))


def test_without_proc_it_is_not_known(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PROC", Path("/nowhere/at/all"))
    assert math.isnan(after(machine, load.Watch(), 4.0, 6.0, 4.0))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts by Linux's /proc")
def test_a_busy_process_is_noticed_unless_it_is_known() -> None:
    with busy(1) as pids:
        others, known = load.Watch(), load.Watch(pids)
        time.sleep(1.2)
        with_it, without_it = others.cores(), known.cores()
    assert with_it > load.QUIET  # whatever else runs here
    assert with_it - without_it > 0.02  # its share of cores that others use too


# --- the line that `bench run` prints, and what it records ----------------------------------------------------------


def ran(cores: float, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], record.Record]:
    """What a run says, and its row, where others took so many cores."""
    monkeypatch.setattr(load.Watch, "cores", lambda self: cores)
    monkeypatch.setattr(peak, "measure", lambda *args: peak.Peak(100.0, "given"))
    said: list[str] = []
    (row,) = runner.run(["tiny"], runner.Options(("mtml",), seconds=0.01, threads=1), said.append)
    return said, row


def test_a_run_on_a_busy_machine_says_so_on_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said, row = ran(0.35, monkeypatch)
    (warned,) = [line for line in said if "not quiet" in line]
    assert warned.startswith("tiny: ") and "0.35 of a core" in warned and "\n" not in warned
    record.write_csv(tmp_path / "run.csv", [row])
    (read,) = record.read_csv(tmp_path / "run.csv")
    assert read.other_load == 0.35
    named = replace(read, workload="sinusoid")
    assert "not a quiet machine: other processes took up to 0.35 of a core" in readme.table([named])
    assert "quiet" not in readme.table([replace(named, other_load=0.05)])


@pytest.mark.parametrize("cores", [0.05, math.nan])
def test_a_quiet_or_unknown_machine_is_not_accused(cores: float, monkeypatch: pytest.MonkeyPatch) -> None:
    said, row = ran(cores, monkeypatch)
    assert not any("quiet" in line for line in said)
    assert row.other_load == cores or (math.isnan(row.other_load) and math.isnan(cores))


def test_the_median_is_printed_with_the_interquartile_range() -> None:
    row = record.Record("tiny", "mtml", "ok", ms=2.0, iqr_ms=0.25, best_ms=1.5, n=7, peak_gflops=1.0)
    assert "2.000 ms (IQR    0.250)  best      1.500  n=7" in runner.line(row)
