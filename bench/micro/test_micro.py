"""Micro-benchmarks for pytest-benchmark, not part of the default test run: ``pytest bench/micro/test_micro.py``.

    pytest bench/micro/test_micro.py --benchmark-autosave
    pytest bench/micro/test_micro.py --benchmark-compare --benchmark-compare-fail=median:10%

One meta-step of the small workloads through ``meta_loss(...)`` and ``backward()``, and the kernel's own modes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.measure import kernel, runner
from bench.report import record

WORKLOADS = ("tiny", "sinusoid", "omniglot_mlp")
KERNELS = {
    "sinusoid": kernel.Options((1, 40, 40, 1), tasks=25, support=10, query=10, steps=5, loss="mse"),
    "omniglot_mlp": kernel.Options((784, 256, 128, 64, 64, 5)),
}


def _describe(benchmark: Any) -> None:
    where = record.environment()
    benchmark.extra_info.update(
        {name: where[name] for name in ("machine", "isa", "threads", "version", "torch", "sha")}
    )


@pytest.mark.parametrize("workload", WORKLOADS)
def test_meta_step(benchmark: Any, workload: str) -> None:
    step = runner.prepare(runner.find(workload), "mtml", torch.float32, "cpu")
    _describe(benchmark)
    loss, _grads = step.result(benchmark(step.run))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("mode", kernel.MODES)
@pytest.mark.parametrize("shape", KERNELS)
def test_inner_loop(benchmark: Any, shape: str, mode: Any) -> None:
    call = kernel.inner_loop(KERNELS[shape], mode)
    _describe(benchmark)
    assert benchmark(call) is not None
