"""``python -m bench autocast``: what it prints and refuses; nothing here measures speed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure.autocast import AUTOCAST, BFLOAT16, FLOAT32, LOOP, Compared  # noqa: E402


def test_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autocast", "tiny", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("x float32  error" in line for line in lines)
    for line, name in zip(lines, (FLOAT32, AUTOCAST, BFLOAT16, LOOP), strict=True):
        assert line.split(maxsplit=1)[1].startswith(name)


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_worse_gradients_are_not_timed(error: float) -> None:
    found = Compared("tiny", {FLOAT32: 1e-7, AUTOCAST: error, BFLOAT16: 1e-3, LOOP: 4e-3}, {})
    assert not found.ok
    assert "not timed" in found.lines()[0]


def test_an_unknown_workload(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autocast", "none"]) == 2
    assert "expected one of" in capsys.readouterr().err
