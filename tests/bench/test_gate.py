"""The gates of every comparison under bench/: no NaN passes one, wherever it stands among the errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench import compat  # noqa: E402
from bench.gpu import head_inner_loop, multihead_loss  # noqa: E402
from bench.measure import autocast, multitask, ranks, task_map  # noqa: E402
from bench.measure.gate import median, relative, within, worst  # noqa: E402
from bench.measure.match import Truth  # noqa: E402
from bench.report.compare import compare  # noqa: E402
from bench.report.record import Record  # noqa: E402

NAN, INF = math.nan, math.inf


def test_nan_is_the_worst_of_errors_and_within_no_limit() -> None:
    assert worst([0.25, 0.5, 0.0]) == 0.5
    assert median([3.0, 1.0, 2.0]) == 2.0
    for errors in ([NAN, 0.0], [0.0, NAN], [0.0, NAN, 1.0]):
        assert math.isnan(worst(errors)) and math.isnan(median(errors))
    assert math.isnan(worst([]))
    assert within(1.0, 1.0) and not within(1.5, 1.0)
    assert not any(within(*pair) for pair in [(NAN, 1.0), (0.0, NAN), (0.0, INF), (INF, INF), (NAN, NAN)])


def pairs() -> list[tuple[list[Tensor], list[Tensor]]]:
    """(found, expected) of two tensors: a NaN in what was found, or in what was expected, in the first or second."""
    fine, broken = torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN])
    return [
        ([fine, broken], [fine, fine]),
        ([broken, fine], [fine, fine]),
        ([fine, fine], [fine, broken]),
        ([fine, fine], [broken, fine]),
    ]


@pytest.mark.parametrize("case", range(4))
def test_nan_in_any_tensor_is_an_error(case: int) -> None:
    found, expected = pairs()[case]
    assert math.isnan(relative(found, expected))
    assert math.isnan(head_inner_loop.error(found, expected))
    assert math.isnan(multihead_loss.error((found[0], found[1:]), (expected[0], expected[1:])))
    ways = {"one": (build, expected), "other": (build, found)}
    assert math.isnan(compat.error_of(ways, 1))


def build(package: Any, model: nn.Module, tasks: Any, lr: float, steps: int) -> Any:
    """A way of `bench compat` whose first parameters get the gradients that `package` holds."""

    def forward() -> Tensor:
        pairs = zip(model.parameters(), package, strict=False)
        return sum((g.sum() * p.sum() for p, g in pairs), torch.zeros((), dtype=torch.float64)) * 1.0

    return forward


def test_reports_with_nan_or_no_limit_are_not_ok() -> None:
    for error in (NAN, INF):
        assert not compat.Comparison("higher", {}, error, 5).ok
        workload: Any = SimpleNamespace(name="any")
        assert not ranks.Scaling(workload, 2, 1, {}, 1, error).ok
        assert not task_map.Ways(workload, {}, {"vmap": 0.0, "MAML": error}).ok
        assert not multitask.MultiTask(4, {}, {torch.float32: {"mtml": 0.0, "func": error}}).ok
        for errors in ((error, 1.0), (0.0, error)):  # the loop's own is the limit
            found = dict(zip((autocast.AUTOCAST, autocast.LOOP), errors, strict=True))
            assert not autocast.Compared("any", found, {}).ok


def test_a_reference_that_overflowed_excuses_nothing() -> None:
    exact = (torch.tensor(1.0, dtype=torch.float64), [torch.ones(2, dtype=torch.float64)])
    for value in (INF, NAN):
        truth = Truth(exact, (torch.tensor(1.0), [torch.tensor([1.0, value])]), 1e-6)
        wrong = (torch.tensor(1.0), [torch.tensor([1.0, 100.0])])
        assert not within(truth.judge(wrong).score, 1.0)


@pytest.mark.parametrize("ms", [NAN, 0.0, INF])
def test_a_time_that_is_none_is_no_pass(ms: float) -> None:
    base, head = (Record("any", "mtml", "ok", ms=value, best_ms=value, iqr_ms=0.0) for value in (1.0, ms))
    verdict = compare([base], [head])[0]
    assert verdict.regressed and "measure again" in verdict.note
