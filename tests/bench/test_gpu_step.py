"""A step of ``python -m bench gpu`` on the CPU, and its clock on a device that is simulated."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.gpu import clock, kernels, losses, multihead_loss, plan, step, work  # noqa: E402
from bench.gpu.precision import full_precision  # noqa: E402
from bench.gpu.rows import GpuRecord  # noqa: E402
from bench.measure import peak, runner  # noqa: E402
from bench.providers import Unavailable, compile, load  # noqa: E402
from bench.report import predict, record  # noqa: E402
from bench.workloads import WORKLOADS, make_data, make_network  # noqa: E402
from mtml_kernels.schedule.devices import DEVICES  # noqa: E402


class Simulated:
    """A device whose queue is a time: a cold call takes three times a hot one; without a hold a call shows its host."""

    def __init__(self, host: float = 0.001) -> None:
        self.now, self.host, self.device = 0.0, host, 0.0
        self.cold, self.flushed, self.held = False, 0, list[float]()

    def run(self) -> None:
        self.now += self.host  # the host hands over, then the device works when it is free
        self.device = max(self.device, self.now) + (0.0003 if self.cold else 0.0001)
        self.cold = False

    def mark(self) -> float:
        self.device = max(self.device, self.now)
        return self.device

    def milliseconds(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def synchronize(self) -> None:
        self.now = max(self.now, self.device)

    def flush(self) -> None:
        self.cold, self.flushed = True, self.flushed + 1

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)
        self.device = max(self.device, self.now) + seconds


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    device = Simulated()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: device.now)
    return device


@pytest.mark.parametrize(("cold", "ms"), [(False, 0.1), (True, 0.3)])
def test_device_time_is_that_of_the_device_alone(cold: bool, ms: float, simulated: Simulated) -> None:
    """The host takes ten times as long: the hold covers it."""
    found = clock.device_time(simulated.run, simulated, cold=cold, seconds=0.1)
    assert found.ms == pytest.approx(ms) and found.iqr_ms == pytest.approx(0, abs=1e-9)
    assert found.n >= clock.FEWEST and simulated.flushed == (found.n if cold else 0)
    assert all(0.001 < held < clock.LONGEST_HOLD for held in simulated.held)


def test_device_time_of_a_slow_host_has_its_gaps(simulated: Simulated) -> None:
    simulated.host = 0.1
    found = clock.device_time(simulated.run, simulated, cold=False, seconds=0.1)
    assert found.n == clock.FEWEST and found.ms > 50
    assert set(simulated.held) == {clock.LONGEST_HOLD}


def event(name: str, start: float, us: float, device: str = "DeviceType.CUDA") -> Any:
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, elapsed_us=lambda: us)
    )


def test_kernels_stand_in_the_order_in_which_they_ran() -> None:
    events = [event("second", 5.0, 2.0), event("host", 0.0, 9.0, "DeviceType.CPU"), event("first", 1.0, 3.0)]
    events.append(event("a range around both", 1.0, 6.0))
    events[-1].is_user_annotation = True
    assert list(clock.in_order(events)) == [("first", 3.0), ("second", 2.0)]


def test_kernels_beside_the_calls_of_the_schedule(tmp_path: Path) -> None:
    schedule = predict.predict(WORKLOADS["tiny"], DEVICES["h200"], "fp32")
    ran = [clock.Kernel(f"k{i}", 1.5) for i in range(len(schedule.lines))]
    row = GpuRecord("tiny", "mtml:triton", "ok")
    path = kernels.write_kernels(tmp_path, row, ran, schedule)
    assert path.name == "kernels-tiny-mtml-triton.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["kernel"] for r in rows] == [k.name for k in ran]
    for r, call in zip(rows, schedule.lines, strict=True):
        assert call.name in r["call"] and float(r["predicted_us"]) == pytest.approx(1e6 * call.predicted.seconds, 0.01)
    fewer = kernels.table(ran[1:], schedule)  # whose is which is not known then
    assert len(fewer) == len(ran) - 1 and all(cells[2:] == ("",) * 5 for cells in fewer)


# --- a step -----------------------------------------------------------------------------------------------------------


class Host:
    """The CPU as a device."""

    def __init__(self, dies: Callable[[], bool] = lambda: False) -> None:
        self.dies = dies

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def synchronize(self) -> None:
        if self.dies():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def flush(self) -> None:
        pass

    def hold(self, seconds: float) -> None:
        pass


def place(out: Path, clock: Host | None = None) -> step.Place:
    return step.Place(out, clock or Host(), "cpu", 0.02, 0.01)


@pytest.fixture(autouse=True)
def a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "measure", lambda *args: peak.Peak(100.0, "given"))


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find(name, *more))


def rows_of(out: Path) -> dict[str, GpuRecord]:
    return {r.provider: r for r in record.read_rows(out / "results.csv", GpuRecord)}


def test_a_meta_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "jax")
    providers = ("loop", "vmap", "jax", "mtml:torch", "mtml:triton", "mtml:cuda")
    step.measure(plan.Step("tiny", "quick", providers), place(tmp_path))
    rows = rows_of(tmp_path)
    assert list(rows) == [
        "jax",
        "mtml:triton",
        "mtml:cuda",
        "loop",
        "vmap",
        "mtml:torch",
    ]  # what cannot run is written at once
    assert rows["jax"].status == rows["mtml:cuda"].status == "skipped" and rows["mtml:triton"].status == "failed"
    assert "backend 'cuda' cannot run here" in rows["mtml:cuda"].note and rows["mtml:triton"].note
    ours = rows["mtml:torch"]
    told = predict.predict(WORKLOADS["tiny"], DEVICES["h200"], "fp32")
    assert ours.ok and ours.match_score <= 1 and ours.turn == "quick" and ours.date and ours.torch
    assert ours.gflop == pytest.approx(told.flops / 1e9, rel=1e-4)
    assert ours.predicted_ms == pytest.approx(1e3 * told.seconds, rel=1e-4)
    assert ours.predicted_launches == len(told.lines)
    assert ours.tflops == pytest.approx(told.flops / ours.hot_ms / 1e9, rel=1e-3)
    assert ours.tbs == pytest.approx(told.bytes / ours.hot_ms / 1e9, rel=1e-3)
    for r in (ours, rows["loop"], rows["vmap"]):
        assert r.ms > 0 and r.hot_ms > 0 and r.cold_ms > 0 and r.share_of_peak > 0
    assert math.isnan(rows["vmap"].predicted_ms) and rows["vmap"].predicted_launches == 0
    assert (tmp_path / "now").read_text() == ""


def test_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "quack")
    monkeypatch.setattr(losses, "DTYPE", torch.float32)
    step.measure(plan.Step("loss_many_small", "quick", ("eager", "quack", "mtml")), place(tmp_path))
    rows = rows_of(tmp_path)
    assert {r.workload for r in rows.values()} == {"loss_many_small"}
    assert rows["quack"].note == "quack is not installed (pip install quack-kernels)"
    assert rows["mtml"].status == "failed"  # its kernels do not run on the CPU
    assert rows["eager"].ok and rows["eager"].hot_ms > 0 and rows["eager"].dtype == "float32"
    assert rows["eager"].mbytes == pytest.approx(
        work.of_losses("many_small", torch.float32, DEVICES["h200"]).bytes / 1e6
    )


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = losses.Admission("many_small", multihead_loss.many_small, torch.float32, "cpu")
    right = multihead_loss.pytorch_loss
    monkeypatch.setattr(multihead_loss, "pytorch_loss", lambda z, y, spec: right(z, y, spec) * 1.01)
    run, row = admission.admit("eager")
    assert run is None and row.status == "mismatch" and "not timed" in row.note and row.match_score > 1


def test_a_provider_that_kills_the_device_is_named(tmp_path: Path) -> None:
    """Its row is written, and the step ends: whatever came next would fail too."""
    device = place(tmp_path, Host(lambda: (tmp_path / "now").read_text() == "mtml:cuda"))
    with pytest.raises(step.Fault, match="mtml:cuda: CUDA error"):
        step.measure(plan.Step("tiny", "quick", ("loop", "mtml:cuda", "vmap")), device)
    assert list(rows_of(tmp_path)) == ["mtml:cuda"] and (tmp_path / "now").read_text() == "mtml:cuda"


def test_a_kernel_that_faults_while_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(step.timing, "interleave", fault)
    with pytest.raises(step.Fault, match="timing: CUDA error"):
        step.measure(plan.Step("tiny", "quick", ("loop",)), place(tmp_path))
    assert (tmp_path / "now").read_text() == "timing"


def test_a_row_without_device_time_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step, "device_time", fails)
    step.measure(plan.Step("tiny", "quick", ("loop",)), place(tmp_path))
    row = rows_of(tmp_path)["loop"]
    assert row.ok and row.ms > 0 and math.isnan(row.hot_ms) and "stream is capturing" in row.note


def test_a_gpu_whose_numbers_are_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work is counted all the same; nothing is predicted."""
    monkeypatch.setattr(step, "device_here", lambda: (None, "NVIDIA B17"))
    step.measure(plan.Step("tiny", "quick", ("mtml:torch",)), place(tmp_path))
    row = rows_of(tmp_path)["mtml:torch"]
    assert row.ok and row.tflops > 0 and math.isnan(row.predicted_ms) and row.predicted_launches == 0
    assert "no numbers of NVIDIA B17 are known" in capsys.readouterr().out


def test_jax_has_no_device_time() -> None:
    """Its streams are its own: events would measure nothing."""
    row = GpuRecord("tiny", "jax:map", "ok")
    assert step._on_device(row, lambda: None, work.Work(1, 1, 1.0, 1), place(Path())) == row


# --- providers on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["graphs", "loop+graphs"])
def test_cuda_graphs_are_asked_for(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def compiled(fn: Callable[..., Any], mode: object = None) -> Callable[..., Any]:
        asked.append(mode)
        out: Any = None

        def call(*args: Any) -> Any:
            nonlocal out  # a replay writes over the results of the one before
            new = fn(*args)
            if out is None:
                out = new
            else:
                torch.utils._pytree.tree_map_(lambda held, given: held.copy_(given), out, new)
            return out

        return call

    monkeypatch.setattr(compile.torch, "compile", compiled)
    w = WORKLOADS["tiny"]
    prepared, row = runner.admit(w, f"compile:{options}", runner.Options(), runner.gate_for(w, runner.Options()))
    assert prepared is not None and row.ok, row.note
    assert asked and set(asked) == {"reduce-overhead"}


def test_jax_on_the_cpu_is_no_peer_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    w = replace(WORKLOADS["tiny"], tasks=1)
    bind = load("jax")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(Unavailable, match="this JAX runs on cpu, no GPU"):
        bind(w, make_network(w), make_data(w))


def test_full_precision_is_given_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
