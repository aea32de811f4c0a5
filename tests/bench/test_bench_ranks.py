"""``python -m bench ranks``: what it prints and refuses; nothing here measures speed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure.ranks import AVERAGED, ONE, WRAPPED, Scaling, measure  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402


def found(error: float) -> Scaling:
    return Scaling(WORKLOADS["omniglot_conv"], 2, 1, {ONE: 400.0, AVERAGED: 210.0, WRAPPED: 200.0}, 7, error)


def test_report() -> None:
    text = "\n".join(found(1e-7).lines())
    assert "omniglot_conv: 32 tasks, 1 thread(s) a rank" in text and "1.0e-07, match" in text
    assert "80 tasks/s" in text and "1.90x" in text and "2 ranks, DistributedDataParallel" in text and "2.00x" in text


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_other_gradients_show(error: float) -> None:
    assert not found(error).ok and "THEY DIFFER" in "\n".join(found(error).lines())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["none"], "workload: expected one of"), (["--ranks", "1"], "ranks: expected at least 2")],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", *words]) == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_three_ranks_have_the_gradients_of_one() -> None:
    result = measure("tiny", 3, 1, 0.01)
    assert result.ok and result.n >= 3 and result.ms.keys() == {ONE, AVERAGED, WRAPPED}
