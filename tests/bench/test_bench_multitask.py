"""``python -m bench multitask`` and ``transfer``: what they compare and print; nothing here measures speed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure import multitask, transfer  # noqa: E402
from bench.measure.timing import Timing  # noqa: E402
from bench.workloads.teachers import HEADS, Teachers  # noqa: E402


def found(error: float) -> multitask.MultiTask:
    timings = {way: Timing(ms, ms, 5, 1, 0.0) for way, ms in (("mtml", 2.0), ("loop", 50.0), ("torch.func", 8.0))}
    return multitask.MultiTask(16, timings, {torch.float64: {"mtml": error, "torch.func": 1e-12}})


def test_report() -> None:
    text = "\n".join(found(2e-12).lines())
    assert "4 kinds x 16 tasks" in text and "25.00x" in text and "2.0e-12" in text and "the loop itself" in text


@pytest.mark.parametrize("error", [1e-6, math.nan])
def test_other_gradients_show(error: float) -> None:
    assert found(1e-12).ok and not found(error).ok and "MISMATCH" in found(error).lines()[-1]


def test_ways_have_one_gradient() -> None:
    errors = multitask._errors(2, torch.float64)
    assert set(errors) == {"mtml", "torch.func"} and max(errors.values()) < 1e-9


def losses(meta: float, joint: float) -> transfer.Transfer:
    each = {transfer.START: [2.0, 2.1, 2.2], transfer.JOINT: [joint, joint + 0.1, joint + 0.2]}
    each[transfer.META] = [meta, meta + 0.1, meta + 0.21]
    setting = transfer.Setting(seeds=3)
    return transfer.Transfer(setting, {way: dict.fromkeys(HEADS, values) for way, values in each.items()})


def test_margins_have_intervals() -> None:
    better = losses(1.0, 1.5)
    margin = better.margin(transfer.JOINT, "class")
    assert better.ok and abs(margin.mean - 0.4967) < 1e-4 and 0 < margin.ci95 < 0.1
    assert "yes, in every group" in better.lines()[-1]
    assert not losses(1.0, 1.0).ok and "NO" in losses(1.5, 1.0).lines()[-1]


def test_teachers_have_a_common_part() -> None:
    same, other = (Teachers(0, own).batches(2, 3, 4)["value"] for own in (0.0, 1.0))
    assert same.sx.shape == (2, 3, 8) and torch.equal(same.sx, other.sx) and not torch.equal(same.sy, other.sy)
    again = Teachers(0, 0.0).batches(2, 3, 4)["value"]
    assert torch.equal(same.qy, again.qy)


@pytest.mark.slow
def test_meta_learning_helps_on_new_tasks() -> None:
    """The sign alone, of one seed; the command has the intervals."""
    torch.set_num_threads(1)
    setting = transfer.Setting(seeds=2, iterations=200, test_tasks=20)
    found = transfer._one(setting, 0)
    for group in HEADS:
        assert found[transfer.META][group] < min(found[transfer.START][group], found[transfer.JOINT][group])


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--own", "2"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["transfer", *arguments])
    assert arguments[0] in capsys.readouterr().err
