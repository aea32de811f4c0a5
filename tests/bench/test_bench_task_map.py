"""``python -m bench task-map``: what it prints and refuses; nothing here measures speed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure.task_map import Ways  # noqa: E402
from bench.measure.timing import Timing  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402


def found(error: float) -> Ways:
    timings = {way: Timing(ms, ms, 5, 1, 0.0) for way, ms in (("fused", 0.5), ("loop", 50.0))}
    return Ways(WORKLOADS["sinusoid"], timings, {"fused": error})


def test_report() -> None:
    text = "\n".join(found(2e-7).lines())
    assert "sinusoid:" in text and "100.00x" in text and "2.0e-07" in text and "the loop itself" in text


@pytest.mark.parametrize("error", [1e-2, math.nan])
def test_other_gradients_show(error: float) -> None:
    assert found(1e-6).ok and not found(error).ok


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task-map", "none"]) == 2 and "workload: expected one of" in capsys.readouterr().err
