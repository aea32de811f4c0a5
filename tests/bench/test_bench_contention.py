"""``python -m bench contention``: its processes, its turns, its table; nothing here measures speed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure import contention, runner  # noqa: E402
from bench.measure.busy import busy  # noqa: E402
from bench.providers.base import Prepared  # noqa: E402
from bench.report import readme, record  # noqa: E402
from bench.report.contention import Contended, line, rated, table  # noqa: E402

ROW = Contended(
    "tiny_mlp", "mtml", "ok", ms=2.0, n=300, threads=1, dtype="float32", machine="a machine", date="2026-01-02",
    mean_ms=3.0, p99_ms=8.0,
)  # fmt: skip
BUSY = replace(ROW, busy=2, threads=2, ms=5.0, mean_ms=12.0, p99_ms=32.0)


# --- busy processes -------------------------------------------------------------------------------------------------


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which it stays where nobody asks for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 20.0) -> bool:
    stop = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < stop:
        time.sleep(0.01)
    return not any(map(runs, pids))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in Linux's /proc")


@needs_proc
def test_busy_processes_spin_and_end_with_the_block() -> None:
    with busy(2) as pids:
        assert len(set(pids)) == 2 and all(map(runs, pids)) and os.getpid() not in pids
    assert not any(map(runs, pids))
    with busy(0) as none:
        assert none == []


@needs_proc
def test_an_error_ends_them_too() -> None:
    with pytest.raises(ZeroDivisionError), busy(1) as pids:
        raise ZeroDivisionError
    assert not any(map(runs, pids))


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_end_when_their_parent_is_killed(how: signal.Signals) -> None:
    code = (
        "from bench.measure.busy import busy\nimport time\nwith busy(2) as pids:\n"
        " print(*pids, flush=True)\n time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(runs, pids))
        parent.send_signal(how)
    assert gone(pids)


@needs_proc
def test_ctrl_c_is_left_to_the_parent() -> None:
    """It reaches the whole group: a busy process that went first would end with a traceback amid the report."""
    with busy(1) as (pid,):
        os.kill(pid, signal.SIGINT)
        assert not gone([pid], 0.2)


@needs_proc
def test_one_that_ended_early_spoils_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="expected it to spin until the end"), busy(2) as pids:
        os.kill(pids[1], signal.SIGKILL)
        os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)  # both of its threads; its status is left there
    assert not any(map(runs, pids))


# --- turns ----------------------------------------------------------------------------------------------------------


def turns(monkeypatch: pytest.MonkeyPatch, cost: float, seconds: float) -> tuple[dict[contention.Turn, int], list[int]]:
    """How many calls of ``cost`` seconds each turn gets, and torch's threads at each call, by a made-up clock."""
    now, seen = [0.0], list[int]()
    monkeypatch.setattr(contention.time, "perf_counter", lambda: now[0])

    def call() -> None:
        seen.append(torch.get_num_threads())
        now[0] += cost

    found = contention.in_turn({(1, "a"): call, (2, "a"): call}, seconds)
    assert all(each == pytest.approx(cost) for times in found.values() for each in times)
    return {turn: len(times) for turn, times in found.items()}, seen


def test_threads_take_turns_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    counts, seen = turns(monkeypatch, cost=0.001, seconds=0.5)
    assert torch.get_num_threads() == before and min(counts.values()) >= 450
    blocks = [threads for i, threads in enumerate(seen) if i == 0 or threads != seen[i - 1]]
    assert len(blocks) >= 6 and blocks == [1, 2] * (len(blocks) // 2)
    assert len(seen) > sum(counts.values())  # after each change of threads some calls are not timed


def test_slow_calls_get_200_or_four_times_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(turns(monkeypatch, 0.01, 1.0)[0].values()) <= set(range(200, 230))
    counts = turns(monkeypatch, 0.5, 1.0)[0]
    assert set(counts.values()) == {5}  # 2 turns x 1 s x 4, each timed call beside an untimed one


def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        contention.in_turn({(before + 1, "a"): fail}, 0.01)
    assert torch.get_num_threads() == before


# --- rows and table -------------------------------------------------------------------------------------------------


def test_ratios_are_to_the_same_provider_alone_on_one_thread() -> None:
    other = replace(ROW, provider="loop", ms=50.0)
    found = {(r.row.provider, r.row.busy): r.ratios for r in rated([BUSY, other, ROW, replace(other, busy=1, ms=75.0)])}
    assert found["mtml", 0] == (1, 1, 1) and found["mtml", 2] == (2.5, 4, 4) and found["loop", 1] == (1.5, 1, 1)
    assert all(map(math.isnan, rated([BUSY])[0].ratios))
    assert "2.50x" in line(rated([ROW, BUSY])[1]) and "x)" not in line(rated([BUSY])[0])


def test_the_slowest_in_a_hundred_takes_a_hundred() -> None:
    assert math.isnan(contention.percentile_99([1.0] * 99))
    assert contention.percentile_99([*[1.0] * 197, 7.0, 8.0, 9.0]) == pytest.approx(7.01)


def test_table_stands_between_its_markers(tmp_path: Path) -> None:
    path, csv = tmp_path / "page.md", tmp_path / "run.csv"
    start, end = readme.markers("contention")
    path.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    skipped = replace(ROW, provider="higher", status="skipped", ms=math.nan, note="not installed")
    record.write_csv(csv, [ROW, replace(BUSY, p99_ms=math.nan, other_load=0.42), skipped])
    assert main(["readme", str(csv), "--table", "contention", "--readme", str(path)]) == 0
    text = path.read_text()
    assert "| tiny_mlp | 0 | 1 | mtml | 2 ms (1.00x) | 3 ms (1.00x) | 8 ms (1.00x) | 300 |" in text
    assert "| tiny_mlp | 2 | 2 | mtml | 5 ms (2.50x) | 12 ms (4.00x) | - | 300 |" in text
    assert "a machine" in text and "2026-01-02" in text and "up to 0.42 of a core" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "higher" not in text


def test_files_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several rows of a provider would stand for one in a table of speed, and the last would decide a comparison."""
    ours, plain = str(tmp_path / "contention.csv"), str(tmp_path / "run.csv")
    record.write_csv(ours, [ROW, BUSY])
    record.write_csv(plain, [record.Record("tiny", "mtml", "ok", ms=2.0)])
    for command in (["compare", ours, ours], ["readme", ours], ["plot", ours]):
        assert main(command) == 2
        assert "rows of `python -m bench contention`" in capsys.readouterr().err
    assert main(["readme", plain, "--table", "contention"]) == 2
    assert "no means" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no timed row"):
        table([replace(ROW, status="failed")], "")
    with pytest.raises(ValueError, match="mix machines"):
        table([ROW, replace(BUSY, machine="another")], "")


# --- the command line -----------------------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "run.csv", torch.get_num_threads()
    command = ["contention", "tiny_mlp", "--busy", "0,1", "--threads", "1", "--seconds", "0.01", "--out", str(out)]
    assert main(command) == 0, capsys.readouterr().out
    rows = record.read_rows(out, Contended)
    assert [(r.busy, r.threads, r.provider) for r in rows] == [(b, 1, p) for b in (0, 1) for p in ("mtml", "loop")]
    assert all(r.ok and r.n >= 1 and r.mean_ms > 0 and r.match_score <= 1 for r in rows)
    printed = capsys.readouterr().out
    assert printed.count("(1.00x)") >= 4 and "busy 1  threads 1  loop" in printed
    assert torch.get_num_threads() == before


def test_a_provider_that_does_not_match_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = runner.prepare

    def prepare(w: runner.AnyWorkload, provider: str, *where: object) -> Prepared:
        prepared = right(w, provider, *where)  # type: ignore[arg-type]
        if provider != "mtml":
            return prepared
        return replace(prepared, result=lambda value: (value[0], [g * 1.001 for g in value[1]]))

    monkeypatch.setattr(runner, "prepare", prepare)
    assert main(["contention", "tiny", "--busy", "0", "--threads", "1", "--seconds", "0.01"]) == 1
    printed = capsys.readouterr().out
    assert "not timed" in printed and "threads 1  loop" in printed and "threads 1  mtml" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "workload: expected one of"),
        (["tiny", "--providers", "none"], "provider: expected one of"),
        (["tiny", "--threads", "0,1"], "threads: expected different whole numbers >= 1"),
        (["tiny", "--busy", "1,1"], "busy: expected different whole numbers >= 0"),
        (["tiny", "--busy", ","], "busy: expected different whole numbers >= 0"),
        (["tiny", "--providers", "mtml,jax:map"], "jax keeps the number of threads"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contention", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
