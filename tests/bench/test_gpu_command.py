"""``python -m bench gpu`` without a GPU: the plan, the order of events, what survives a process that dies."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.gpu import command, compiled, kernels, plan, ready, summary, work  # noqa: E402
from bench.gpu import step as step_module  # noqa: E402
from bench.gpu.rows import GpuRecord, line  # noqa: E402
from bench.report import predict, record  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402
from mtml_kernels.schedule.devices import DEVICES  # noqa: E402

H200 = DEVICES["h200"]
SINUSOID = plan.step_named("sinusoid:quick")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def row(workload: str, provider: str, ms: float = 1.0, **more: Any) -> GpuRecord:
    return GpuRecord(workload, provider, "ok", ms=ms, iqr_ms=0.1, machine="a GPU", date="2026-01-02", **more)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_order_is_that_of_importance_and_what_compiles_comes_last() -> None:
    steps = list(plan.steps())
    quick, slow = steps[: len(plan.ORDER)], steps[len(plan.ORDER) :]
    assert [s.workload for s in quick] == [s.workload for s in slow] == list(plan.ORDER)
    assert plan.ORDER[:3] == ("sinusoid", "omniglot_mlp", "omniglot_conv") and plan.ORDER[5] == "anil_head"
    assert not any(p.startswith(("compile", "jax")) for s in quick for p in s.providers)
    last = ("mtml", "mtml:triton", "mtml:cuda")  # ours in every process, and last in it: the newest kernels after all
    assert all(s.providers[-1] in last for s in steps)
    assert all(s.providers[-2:] == last[1:] for s in quick if s.workload in plan.META)
    assert [plan.step_named(s.name) for s in steps] == steps


def test_dry_run_prints_every_step_with_its_prediction(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--dry-run", "--device", "a100"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "A100" in head and len(lines) == 2 * len(plan.ORDER)
    for number, (text, step) in enumerate(zip(lines, plan.steps(), strict=True), 1):
        words = text.split()
        assert words[:3] == [str(number), step.turn, step.workload]
        assert int(words[3]) > 0 and float(words[words.index("predicted") + 1]) > 0
        assert text.endswith(", ".join(step.providers))
    assert main(["gpu", "siren", "sinusoid", "--dry-run"]) == 0
    chosen = [text.split()[1:3] for text in capsys.readouterr().out.splitlines()[1:]]
    assert chosen == [[turn, name] for turn in plan.TURNS for name in ("sinusoid", "siren")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "needs an NVIDIA GPU that PyTorch can use; --dry-run"),
        ([], "out: expected a folder for the results"),
        (["nothing", "--dry-run"], "workload: expected some of sinusoid"),
        (["nothing", "--out", "x"], "workload: expected some of sinusoid"),
        (["--out", "x", "--step", "sinusoid"], "step: expected a workload and one of quick, slow"),
    ],
)
def test_without_a_gpu_it_says_so_in_one_line(
    words: list[str], message: str, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_work_is_that_of_the_schedule() -> None:
    for name in plan.META[:-1]:
        found, told = work.of_meta_step(WORKLOADS[name], H200), predict.predict(WORKLOADS[name], H200, "fp32")
        assert (found.flops, found.bytes, found.calls) == (told.flops, told.bytes, len(told.lines))
        assert found.seconds == told.seconds and found.schedule is not None
    head = work.of_meta_step(WORKLOADS["anil_head"], H200)
    assert round(head.flops / 1e9, 3) == 0.325 and head.schedule is None  # the Gram form's, which no schedule has
    assert head.seconds > head.bytes / H200.l2_bandwidth


def test_work_of_losses() -> None:
    logits = work.of_losses("vocab", torch.bfloat16, H200)
    assert logits.bytes == 2 * 2 * 2048 * 32000 and logits.seconds > logits.bytes / H200.bandwidth
    half, single = (work.of_losses("linear_vocab", dtype, H200) for dtype in (torch.bfloat16, torch.float32))
    assert half.flops == single.flops == 3 * 2 * 8192 * 2048 * 32000 and half.seconds < single.seconds
    assert 2 * half.bytes == single.bytes
    assert work.rates(half, 10.0) == pytest.approx((half.flops / 1e10, half.bytes / 1e10))
    assert all(map(math.isnan, work.rates(half, math.nan)))


# --- processes that die -----------------------------------------------------------------------------------------------


def _python(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(command, "command", lambda step, out, without: [sys.executable, "-S", "-c", code])


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("", ""),
        ("raise SystemExit(3)", "the device gave up"),
        ("raise SystemExit(7)", "exit status 7"),
        ("import time; time.sleep(60)", "stopped after 0 s"),
    ],
)
def test_how_a_process_ended(code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _python(monkeypatch, code)
    assert command._process(SINUSOID, tmp_path, [], 0.4 if "sleep" in code else 30) == why


def test_a_step_starts_again_without_what_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []

    def process(step: plan.Step, out: Path, without: list[str], seconds: float) -> str:
        tried.append(list(without))
        if "mtml:triton" not in without:
            (out / "now").write_text("mtml:triton")
            return "the device gave up"
        return ""

    monkeypatch.setattr(command, "_process", process)
    command.run_step(SINUSOID, tmp_path, command.Budget(6))
    assert tried == [[], ["mtml:triton"]]
    (lost,) = record.read_rows(tmp_path / "results.csv", GpuRecord)
    assert (lost.provider, lost.status, lost.note) == ("mtml:triton", "failed", "the device gave up")
    assert summary.wrong([lost]) == [lost]
    words = command.command(SINUSOID, tmp_path, ["mtml:triton", "loop"])
    assert words[-6:] == ["--step", "sinusoid:quick", "--out", str(tmp_path), "--without", "mtml:triton,loop"]


def test_what_ends_while_all_are_timed_is_laid_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers get their rows in a process without ours; where that ends too, nobody is left to blame."""
    tried: list[list[str]] = []

    def process(step: plan.Step, out: Path, without: list[str], seconds: float) -> str:
        tried.append(list(without))
        (out / "now").write_text(command.TIMING)
        return "stopped after 75 s"

    assert command.TIMING == step_module.TIMING and command.FAULT == step_module.FAULT
    monkeypatch.setattr(command, "_process", process)
    command.run_step(SINUSOID, tmp_path, command.Budget(6))
    assert tried == [[], list(plan.OURS)]
    found = record.read_rows(tmp_path / "results.csv", GpuRecord)
    assert [r.provider for r in found] == [*plan.OURS, command.TIMING]
    assert all(r.note == "stopped after 75 s while all were timed in turn" for r in found)


@pytest.mark.parametrize("at", ["", "nobody"])
def test_a_step_that_ends_for_no_provider_is_not_repeated(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def process(step: plan.Step, out: Path, without: list[str], seconds: float) -> str:
        tried.append(step.name)
        (out / "now").write_text(at)
        return "exit status 1"

    monkeypatch.setattr(command, "_process", process)
    command.run_step(SINUSOID, tmp_path, command.Budget(6))
    assert tried == ["sinusoid:quick"]
    assert [r.provider for r in record.read_rows(tmp_path / "results.csv", GpuRecord)] == [at or "all"]


def test_a_budget_that_is_spent_leaves_rows_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(*a: object) -> str:
        raise AssertionError("started without time")

    monkeypatch.setattr(command, "_process", process)
    command.run_step(SINUSOID, tmp_path, command.Budget(0.01))
    found = record.read_rows(tmp_path / "results.csv", GpuRecord)
    assert [(r.provider, r.status, r.note) for r in found] == [(p, "skipped", "no time left") for p in plan.QUICK]
    with pytest.raises(ValueError, match="minutes: expected a number > 0, got 0"):
        command.Budget(0.0)


# --- build and gate ---------------------------------------------------------------------------------------------------


def test_nothing_is_built_where_the_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []

    given: list[Any] = []

    def run(words: tuple[str, ...], cwd: Path, seconds: float, more: Any = None) -> ready.Done:
        ran.append(tuple(words))
        given.append(more)
        found = ready.PROBE in words and (len(ran) > 1 or not missing)
        return ready.Done(found or ready.PROBE not in words, "said")

    monkeypatch.setattr(ready, "_run", run)
    monkeypatch.setattr(ready, "cuda_variables", lambda: {"MTML_CUDA": "1"})
    missing = False
    assert ready.build(60).why == "found built" and len(ran) == 1
    ran.clear()
    missing = True
    assert ready.build(60) == ready.Done(True, "built in place", "")
    assert [words[1] for words in ran] == ["-c", "-m", "-c"] and ran[1][-1] == str(ROOT)
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(ran[1])
    assert given[-3:] == [None, {"MTML_CUDA": "1"}, None]


def test_a_build_has_code_for_this_gpu_where_there_is_nvcc(tmp_path: Path) -> None:
    assert ready.cuda_variables({"CUDA_HOME": str(tmp_path)}) == {}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    found = {"CUDA_HOME": str(tmp_path)}
    assert ready.cuda_variables(found) == {"MTML_CUDA": "1", "MTML_CUDA_ARCHS": "native"}
    assert ready.cuda_variables(found | {"MTML_CUDA": "0"}) == {"MTML_CUDA_ARCHS": "native"}


GATED = "import pytest\n@pytest.mark.gpu\ndef test_one(): {}\ndef test_other(): assert False\n"


@pytest.mark.parametrize(
    ("body", "ok", "why"),
    [
        ("pass", True, "1 GPU tests passed, 0 skipped"),
        ("assert 1 + 1 == 3", False, "the GPU tests failed: exit status 1"),
        ("pytest.skip('no device')", False, "no GPU test ran (1 of 1 were skipped)"),
    ],
)
def test_the_gate(body: str, ok: bool, why: str, tmp_path: Path) -> None:
    """Only what is marked runs; a failure and a test that was skipped both stop everything."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_gated.py").write_text(GATED.format(body))
    done = ready.gate(tmp_path, 60, tmp_path)
    assert (done.ok, done.why) == (ok, why)
    assert (tmp_path / "gate.txt").read_text() == done.output
    assert ok or "assert 1 + 1 == 3" in done.tail() or "skipped" in done.tail()


def test_a_gate_without_marked_tests_is_red(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_one(): pass\n")
    assert not ready.gate(tmp_path, 60, tmp_path).ok


def test_no_speed_on_a_red_gate(
    a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ready, "build", lambda seconds: ready.Done(True, "found built"))
    red = ready.Done(False, "the GPU tests failed: exit status 1", "first\nE  assert 2 == 3")
    monkeypatch.setattr(ready, "gate", lambda out, seconds, *of: red)
    monkeypatch.setattr(command, "run_step", lambda *a: pytest.fail("measured"))
    assert main(["gpu", "--out", str(tmp_path / "new")]) == 1
    shown = capsys.readouterr()
    assert "assert 2 == 3" in shown.err and "nothing was measured" in shown.err
    assert not (tmp_path / "new" / "results.csv").exists()


def test_the_whole_command(
    a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps in order into one file, of this run alone, then the summary; wrong rows of ours give status 1."""
    good = ready.Done(True, "well")
    monkeypatch.setattr(ready, "build", lambda seconds: good)
    monkeypatch.setattr(ready, "gate", lambda out, seconds, *of: good)
    out = tmp_path / "run"
    record.write_csv(out / "results.csv", [row("old", "mtml")])
    seen: list[str] = []

    def run_step(step: plan.Step, folder: Path, budget: command.Budget, refused: dict[str, str]) -> None:
        assert refused == {}
        seen.append(step.name)
        rows = [row(step.workload, "vmap", 3.0, turn=step.turn), row(step.workload, "mtml:triton", turn=step.turn)]
        record.write_csv(folder / "results.csv", rows, append=True)

    monkeypatch.setattr(command, "run_step", run_step)
    assert main(["gpu", "--out", str(out), "siren"]) == 0
    assert seen == ["siren:quick", "siren:slow"]
    printed = capsys.readouterr().out
    assert "mtml:triton 1000.0 us, 3.00 x the fastest peer (vmap 3000.0 us)" in printed
    assert {r.workload for r in record.read_csv(out / "results.csv")} == {"siren"}  # other commands read it too
    record.write_csv(out / "results.csv", [GpuRecord("siren", "mtml:triton", "mismatch")], append=True)
    assert command.finish(out, command.Budget(1)) == 1


@pytest.mark.parametrize(
    ("done", "refused"),
    [
        (ready.Done(True, "12 GPU tests passed, 0 skipped"), {}),
        (ready.Done(False, "no GPU test ran (12 of 12 were skipped)"), {}),  # the provider says why
        (
            ready.Done(False, "the GPU tests failed: exit status 1"),
            {"mtml:cuda": "the GPU tests failed: exit status 1"},
        ),
    ],
    ids=["green", "none ran", "red"],
)
def test_a_red_gate_of_backend_cuda_takes_its_own_rows_only(
    done: ready.Done, refused: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, str]] = []

    def gate(out: Path, seconds: float, folder: Path, name: str) -> ready.Done:
        seen.append((folder, name))
        return done

    started: list[list[str]] = []

    def process(step: plan.Step, out: Path, without: list[str], seconds: float) -> str:
        started.append(list(without))
        return ""

    monkeypatch.setattr(ready, "gate", gate)
    monkeypatch.setattr(command, "_process", process)
    assert command.refused_by_cuda_gate(tmp_path, command.Budget(1)) == refused
    assert seen == [(ROOT / "tests" / "cuda", "gate-cuda")]
    command.run_step(SINUSOID, tmp_path, command.Budget(6), refused)
    assert started == [list(refused)]
    found = record.read_rows(tmp_path / "results.csv", GpuRecord) if refused else []
    assert [(r.provider, r.status, r.note) for r in found] == [(p, "failed", why) for p, why in refused.items()]


# --- the summary ------------------------------------------------------------------------------------------------------


def test_summary_compares_within_a_turn_and_with_the_prediction() -> None:
    ours = row("siren", "mtml:triton", 2.0, turn="quick", kernel_ms=0.5, predicted_ms=0.25, predicted_launches=58)
    rows = [ours, row("siren", "vmap", 3.0, turn="quick"), row("siren", "compile:graphs", 1.0, turn="slow")]
    quick, slow = summary.lines(rows)
    assert "1.50 x the fastest peer (vmap" in quick
    assert "on the device 500.0 us, predicted 250.0 (2.00 x)" in quick
    assert slow.endswith("no time of ours")
    assert "predicted 250.0 in 58" in line(ours) and "predicted" not in line(rows[1])
    assert "failed: why" in line(GpuRecord("siren", "jax", "failed", note="why"))


def test_the_latest_row_counts() -> None:
    rows = [row("siren", "vmap", 3.0, turn="quick"), row("siren", "vmap", 2.0, turn="quick"), row("siren", "vmap")]
    assert [(r.ms, r.turn) for r in command.latest(rows)] == [(2.0, "quick"), (1.0, "")]


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("siren", "vmap", 3.0), row("siren", "mtml:triton", hot_ms=0.5, predicted_ms=0.2, predicted_launches=1)]
    (path,) = summary.plots([*rows, row("sinusoid", "loop")], tmp_path)
    assert path.stat().st_size > 1000
    assert summary.plots([GpuRecord("siren", "vmap", "failed")], tmp_path) == []
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    assert summary.plots(rows, tmp_path) == [] and "no plot: matplotlib is not installed" in capsys.readouterr().out


# --- the second prediction --------------------------------------------------------------------------------------------


def test_the_second_prediction_is_of_our_schedules_in_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a workload; not for peers, heads, losses, or rows that have no first one; none where time is over."""
    asked: list[tuple[str, str]] = []

    def find(workload: str, device: str, folder: Path, seconds: float) -> compiled.Found | None:
        asked.append((workload, device))
        return None if workload == "sinusoid" else {"us": "500.0", "launches": "74"}

    ours: dict[str, Any] = {"predicted_ms": 0.25, "predicted_launches": 58}
    names = [("siren", "mtml:triton"), ("siren", "vmap"), ("anil_head", "mtml:triton"), ("loss_vocab", "mtml:triton")]
    rows = [row(*name, turn=turn, **ours) for turn in plan.TURNS for name in names]
    rows += [row("sinusoid", "mtml:triton", **ours), row("omniglot_mlp", "mtml:triton")]
    monkeypatch.setattr(compiled, "device_here", lambda: (H200, "H200"))
    found = compiled.predicted(rows, tmp_path, lambda: 60.0, find)
    assert asked == [("siren", "h200"), ("sinusoid", "h200")]
    told = [(r.workload, r.provider) for r in found if r.compiled_launches]
    assert told == [("siren", "mtml:triton")] * 2 and found[0].compiled_ms == 0.5
    assert [replace(r, compiled_ms=math.nan, compiled_launches=0).key for r in found] == [r.key for r in rows]
    text = next(summary.lines([replace(found[0], kernel_ms=1.0)]))
    assert text.endswith("predicted 250.0 (4.00 x), from its kernels 500.0 (2.00 x)")
    assert not any(r.compiled_launches for r in compiled.predicted(rows, tmp_path, lambda: 0.0, find))
    monkeypatch.setattr(compiled, "device_here", lambda: (None, "a GPU without numbers"))
    assert not any(r.compiled_launches for r in compiled.predicted(rows, tmp_path, lambda: 60.0, find))


def test_a_second_prediction_that_fails_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(words: Any, **options: Any) -> Any:
        raise subprocess.TimeoutExpired(words, options["timeout"])

    def broken(words: Any, **options: Any) -> Any:
        raise subprocess.CalledProcessError(2, words, stderr="bench: no disassembler")

    def well(words: Any, **options: Any) -> Any:
        assert "TRITON_INTERPRET" not in options["env"] and words[words.index("--device") + 1] == "h200"
        Path(words[-1]).write_text("us,launches\n12.5,3\n")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for run, said in ((late, "no time left"), (broken, "bench: no disassembler")):
        monkeypatch.setattr(compiled.subprocess, "run", run)
        assert compiled.predict("siren", "h200", tmp_path, 5) is None and said in capsys.readouterr().out
    monkeypatch.setattr(compiled.subprocess, "run", well)
    assert compiled.predict("siren", "h200", tmp_path, 5) == {"us": "12.5", "launches": "3"}


def test_kernels_that_ran_stand_beside_what_was_predicted(tmp_path: Path) -> None:
    """Ours by name and order among copies and PyTorch's; nothing is written where one is missing."""
    ran, told = tmp_path / "kernels.csv", tmp_path / "launches.csv"
    assert not compiled.put_beside(ran, told)
    names = ["Memcpy", "launched", "void at::cat", "mean_kernel", "launched"]
    lines = "\n".join(f"{name},{i}.5,,,,," for i, name in enumerate(names))
    ran.write_text(f"{','.join(kernels.COLUMNS)}\n{lines}\n")
    told.write_text("kernel,us,bound\nlaunched,1,issue\ntorch stack,2,launch\nmean_kernel,3,bytes\n")
    before = ran.read_text()
    assert not compiled.put_beside(ran, told) and ran.read_text() == before
    told.write_text(f"{told.read_text()}launched,4,latency\n")
    assert compiled.put_beside(ran, told)
    found = list(csv.DictReader(ran.open()))
    assert [row["us"] for row in found] == [f"{i}.5" for i in range(5)]
    assert [row["compiled_us"] for row in found] == ["", "1", "", "3", "4"]
    assert [row["compiled_bound"] for row in found] == ["", "issue", "", "bytes", "latency"]
