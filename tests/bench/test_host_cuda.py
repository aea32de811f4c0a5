"""Host time of backend `cuda` without its kernels: what is timed is what runs on a GPU."""

from __future__ import annotations

import pytest

from bench.__main__ import main
from bench.measure import host, host_cuda
from bench.workloads import WORKLOADS
from mtml_kernels.ops.inner_loop import BACKENDS


def test_both_ways_are_native_calls() -> None:
    before = BACKENDS.named("cuda")
    with host_cuda.without_kernels():
        runs = host.runs_of(WORKLOADS["sinusoid"], "cuda")
        grads = [run() for run in runs.values() for _ in range(2)]
        lanes = [lane for _, lane in BACKENDS.named("cuda").fast_lane.calls.values()]
    assert lanes and all(lane is not None and lane.call.backward is not None for lane in lanes)
    shapes = {tuple(g.shape for g in each) for each in grads}
    assert len(shapes) == 1
    assert BACKENDS.named("cuda") is before


def test_the_command_says_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "sinusoid", "--backend", "cuda", "--seconds", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "mtml_kernels.inner_loop by backend cuda without its kernels" in out
    assert out.count(" times an autograd.Function that does nothing") == 2 and "the thread's own time" in out


def test_a_workload_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "nothing", "--backend", "cuda"]) == 2
    assert "workload: expected one of" in capsys.readouterr().err
