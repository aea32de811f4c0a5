"""Host time of the CPU engine without what it computes: what is timed is what runs."""

from __future__ import annotations

import pytest
import torch

from bench.__main__ import main
from bench.measure import host
from bench.workloads import WORKLOADS
from mtml_kernels.ops.inner_loop import BACKENDS


def test_both_ways_are_native_calls_that_compute_nothing() -> None:
    lanes = BACKENDS.named("cpu").fast_lane.calls
    lanes.clear()
    inside = host.native_clock()
    with host.without_engine():
        runs, before = host.runs_of(WORKLOADS["sinusoid"], "cpu"), inside()
        grads = [run() for run in runs.values() for _ in range(2)]
        assert inside() == before
    assert lanes and all(lane is not None and lane.call.backward is not None for _, lane in lanes.values())
    assert len({tuple(g.shape for g in each) for each in grads}) == 1
    runs["module"]()
    assert inside() > before


def test_the_function_that_does_nothing_does_nothing() -> None:
    params, x = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)], torch.ones(4)
    results = [torch.zeros(5), torch.zeros(1)]
    found = host.nothing_like(params, [x], results).apply(*params, x)
    assert [t.shape for t in found] == [t.shape for t in results]
    grads = torch.autograd.grad(found[0], params, torch.ones(5))
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(grads, params, strict=True))


def test_the_clock_of_the_host_stands_still_inside_native_code() -> None:
    run = host.runs_of(WORKLOADS["sinusoid"], "cpu")["module"]
    run()
    inside = host.native_clock()
    with host.one_thread(), host.host_clock() as clock:
        start, began = clock(), inside()
        for _ in range(20):
            run()
        assert 0 < clock() - start < 20 * 0.05
        assert inside() > began


def test_the_command_says_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["host", "sinusoid", "--seconds", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "mtml.MAML by the CPU engine without what it computes" in out
    assert out.count(" times an autograd.Function that does nothing") == 2 and "less the time inside it" in out
    assert torch.get_num_threads() == threads
