"""Mutated calls of every op, on the engine under AddressSanitizer and UBSan: no crash, and every error has words."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzz.build import build, runtime
from fuzz.run import run_under_sanitizers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtime() is None, reason="the C++ compiler has no AddressSanitizer"),
]

CALLS = 36_000  # 100 000 take 4 minutes: python tests/fuzz/run.py --calls 100000


def test_mutated_calls_return_or_say_why_not() -> None:
    build()
    half = CALLS // 2
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_under_sanitizers, f"--calls={half}", f"--seed={seed}") for seed in (0, half)]
    reports = [json.loads(run.result()) for run in runs]
    print(*reports, sep="\n")
    assert sum(report["calls"] for report in reports) == CALLS
    ends = [report["ends"] for report in reports]
    names = ("inner_loop", "inner_loop_backward", "head_inner_loop", "multihead_loss", "linear_multihead_loss()")
    blocks = [f"{op}{way}" for op in ("task_linear", "task_conv2d", "task_update") for way in ("", "_backward")]
    for name in (*names, *blocks):
        returned = sum(end[name].get("returned", 0) for end in ends)
        assert returned > 200, f"{name}: too few faults get past the checks"


def test_a_wrong_read_is_noticed() -> None:
    with pytest.raises(RuntimeError, match=r"heap-buffer-overflow"):
        run_under_sanitizers("--control")
