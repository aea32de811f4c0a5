"""``python -m bench triton-report`` by a timer of our own: Triton's form, gated points, one-line errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.gpu import multihead_loss  # noqa: E402
from bench.report import triton_report as reporting  # noqa: E402
from bench.report.triton_ops import OPS  # noqa: E402
from bench.report.triton_report import Quantiles, Request, Run, triton_report  # noqa: E402

testing = pytest.importorskip("triton.testing", reason="triton is required on Linux only")
SMALL = {
    "inner_loop": Request("inner_loop", "steps", (1, 3), ("mtml", "loop"), device="cpu", workload="tiny"),
    "head_inner_loop": Request("head_inner_loop", "tasks", (1, 2), ("mtml",), device="cpu", sizes={"steps": 2}),
    "multihead_loss": Request("multihead_loss", "classes", (7, 33), device="cpu", sizes={"rows": 9}),
    "linear_multihead_loss": Request("linear_multihead_loss", "rows", (3, 8), device="cpu", sizes={"classes": 17}),
}


class Counted:
    """A timer that runs each call once; the n-th takes n ms, a tenth less and more at the quantiles."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, run: Run) -> Quantiles:
        run()
        self.n += 1
        return self.n, 0.9 * self.n, 1.1 * self.n


def test_there_is_a_case_for_every_op() -> None:
    assert SMALL.keys() == OPS.keys()


@pytest.mark.parametrize("op", SMALL)
def test_form_is_that_of_triton(op: str) -> None:
    request, timer = SMALL[op].complete(), Counted()
    mark = triton_report(SMALL[op], timer)
    assert isinstance(mark, testing.Mark) and isinstance(mark.benchmarks, testing.Benchmark)
    b = mark.benchmarks
    assert (b.x_names, tuple(b.x_vals), b.line_arg) == ([request.axis], request.values, "provider")
    assert tuple(b.line_vals) == tuple(b.line_names) == request.providers and b.ylabel == "ms"
    assert b.args == SMALL[op].sizes and b.plot_name.startswith(op) and b.plot_name.endswith("-wall")
    for x in b.x_vals:  # as Mark.run calls it
        for provider in b.line_vals:
            assert mark.fn(**{b.x_names[0]: x}, provider=provider, **b.args) == (timer.n, 0.9 * timer.n, 1.1 * timer.n)
    assert timer.n == len(b.x_vals) * len(b.line_vals)


def test_the_table() -> None:
    head, columns, first, second = reporting.lines(triton_report(SMALL["inner_loop"], Counted()))
    assert "inner_loop-tiny-steps-wall (ms" in head and columns.split() == ["steps", "mtml", "loop"]
    numbers = [float(word.strip("()")) for word in first.split() if word.strip("()")]
    assert numbers == [1, 1, 0.9, 1.1, 2, 1.8, 2.2]
    assert second.split()[:2] == ["3", "3.0000"]


def test_rates_swap_the_quantiles() -> None:
    request = Request("linear_multihead_loss", "rows", (8,), ("mtml",), device="cpu", metric="tflops")
    point = triton_report(request, Counted()).fn(rows=8, provider="mtml", classes=16, features=4)
    assert point == pytest.approx([6 * 8 * 16 * 4 / ms / 1e9 for ms in (1.0, 1.1, 0.9)])


def test_what_cannot_run_or_is_wrong_has_no_point(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    request = Request("inner_loop", "steps", (2,), ("mtml:cuda",), device="cpu", workload="tiny")
    point = triton_report(request, Counted(), said.append).fn(steps=2, provider="mtml:cuda")
    assert all(map(math.isnan, point)) and "backend 'cuda' cannot run here" in said[-1]
    right, calls = multihead_loss.pytorch_loss, iter([1.0, 1.0, 1.01])  # truth, its own error, the provider
    monkeypatch.setattr(multihead_loss, "pytorch_loss", lambda *a: right(*a) * next(calls))
    request = Request("multihead_loss", "rows", (5,), ("eager",), device="cpu")
    point = triton_report(request, Counted(), said.append).fn(rows=5, classes=6, provider="eager")
    assert all(map(math.isnan, point)) and "not timed" in said[-1]


def test_the_wall_timer() -> None:
    median, low, high = reporting.wall(lambda: None, rounds=5, seconds=1e-4)
    assert 0 < low <= median <= high


@pytest.mark.parametrize(
    ("timer", "name"), [("do_bench", "do_bench"), ("cudagraph", "do_bench_cudagraph"), ("proton", "do_bench_proton")]
)
def test_timers_of_triton(timer: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timer == "proton" or hasattr(testing, name)  # which came later than the oldest Triton that will do

    def bench(run: Run, quantiles: list[float]) -> list[float]:
        assert run() == "called"
        return [10 * q for q in quantiles]

    monkeypatch.setattr(testing, name, bench, raising=False)
    assert reporting.TIMERS[timer](lambda: "called") == (5.0, 2.0, 8.0)
    monkeypatch.delattr(testing, name)
    with pytest.raises(ValueError, match=f"has no {name}; expected wall"):
        reporting.TIMERS[timer](lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "op: expected one of inner_loop, head_inner_loop"),
        (["inner_loop", "--axis", "width"], "axis: expected one of steps, tasks"),
        (["inner_loop", "--values", "1,x"], "values: expected whole numbers such as 1,5,10, got '1,x'"),
        (["inner_loop", "--values", "0"], "values: expected numbers >= 1 for axis 'steps', got (0,)"),
        (["inner_loop", "--workload", "x"], "workload: expected one of sinusoid"),
        (["head_inner_loop", "--workload", "siren"], "workload: expected one of anil_head; got 'siren'"),
        (["multihead_loss", "--workload", "siren"], "workload: expected one of none: this op has no workloads"),
        (["inner_loop", "--timer", "stopwatch"], "timer: expected one of wall, do_bench, cudagraph, proton"),
        (["inner_loop", "--timer", "do_bench"], "timer: 'do_bench' is a GPU's; for device 'cpu' expected 'wall'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["triton-report", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_a_gpu_and_without_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["triton-report", "inner_loop"]) == 2
    assert "no NVIDIA GPU that PyTorch can use; --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="save: Triton's report needs pandas, which is not installed"):
        reporting.save(triton_report(SMALL["inner_loop"], Counted()), tmp_path)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(reporting.TIMERS, "wall", Counted())
    words = ["--device", "cpu", "--axis", "steps", "--values", "2", "--workload", "tiny", "--providers", "mtml,loop"]
    assert main(["triton-report", "inner_loop", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[1].split() == ["steps", "mtml", "loop"]
