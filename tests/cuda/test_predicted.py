"""What explain() predicts of the perceptrons' kernels, and why a call has none: by numbers of these tests' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.cuda_mlp import HostKernels, call_of
from torch import nn

from mtml import MAML
from mtml_kernels.cuda.inner_loop import describe
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.mlp import Bound, Perceptrons
from mtml_kernels.cuda.inner_loop.predicted import (
    ENDS_SECONDS,
    GAP_SECONDS,
    Clocks,
    Prediction,
    Row,
    prediction,
    rows,
)
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import Act
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS

H200 = DEVICES["h200"]
WIDTHS = (1, 40, 40, 1)


def clocks(alone: float, chain: float, issue: float, copied: float = 0.0) -> Clocks:
    return Clocks(alone, chain, {"issue": issue, "fma": issue / 2}, copied)


def row(support: int, alone: float) -> Row:
    ends = (clocks(alone, alone / 2, alone / 4), clocks(3 * alone, 3 * alone / 2, 3 * alone / 4))
    return Row("H200", WIDTHS, "2 rows a warp", 1, support, support, (1, 3), ends)


def bound_of(widths: tuple[int, ...] = WIDTHS, needs: int = NEED_PARAMS, kind: Act = Act.RELU, **options: Any) -> Bound:
    sizes = {"tasks": 3, "support": 10, "query": 10, "steps": 2, "loss": LossSpec("mse"), "dtype": torch.float32}
    found = Perceptrons(HostKernels()).bound(call_of(list(widths), kind, needs, **sizes | options))
    assert found is not None
    return found


def seconds_of(found: Prediction | str) -> float:
    assert isinstance(found, Prediction), found
    return found.seconds


def test_steps_lie_on_a_line() -> None:
    for steps, alone in ((1, 1000), (2, 2000), (3, 3000), (5, 5000)):
        found = prediction(bound_of(steps=steps), H200, (row(10, 1000.0),))
        assert seconds_of(found) == pytest.approx(ENDS_SECONDS + alone / H200.hertz)
        assert isinstance(found, Prediction) and found.bound == "latency" and found.samples is None


def test_more_samples_than_the_call_has_are_said() -> None:
    """The row of the fewest that are enough."""
    known = (row(20, 2000.0), row(30, 3000.0), row(5, 1.0))
    found = prediction(bound_of(support=9, query=11, steps=1), H200, known)
    assert seconds_of(found) == pytest.approx(ENDS_SECONDS + 2000 / H200.hertz)
    assert str(found) == "predicted 5.7 us, bound by latency (of 20 and 20 samples, so at most)"
    assert "no clocks are known of so many samples on H200" in str(prediction(bound_of(), H200, known[2:]))


def test_tasks_beyond_the_chip_are_rounds_or_work() -> None:
    """Of eight tasks a multiprocessor that holds four: the chains of two rounds, or what eight issue."""
    bound = bound_of(tasks=8 * 132, steps=1)
    name = f"{bound.launch.rows} rows a warp"
    for chain, issue, expected, by in ((1000.0, 100.0, 2000, "latency"), (1000.0, 500.0, 4000, "issue")):
        known = Row("H200", WIDTHS, name, 4, 10, 10, (1, 1), (clocks(1.0, chain, issue),) * 2)
        found = prediction(bound, H200, (known,))
        assert seconds_of(found) == pytest.approx(ENDS_SECONDS + expected / H200.hertz)
        assert isinstance(found, Prediction) and found.bound == by


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": Act.TANH}, "an activation that bends"),
        ({"needs": NEED_LR}, "without gradients of rates alone"),
        ({"needs": 0}, "exact second order"),
        ({"first_order": True}, "exact second order"),
    ],
)
def test_what_has_no_clocks_is_said(options: dict[str, Any], why: str) -> None:
    assert why in str(prediction(bound_of(**options), H200, (row(10, 1000.0),)))
    assert "on A100" in str(prediction(bound_of(), DEVICES["a100"], (row(10, 1000.0),)))


def test_products_on_matrix_units_have_no_clocks() -> None:
    """Those of the table are of multiply-adds, of the same widths."""
    bound, known = bound_of((2, 64, 64, 64, 3)), rows()
    assert isinstance(prediction(bound, H200, known), Prediction)
    for terms in (1, 3):
        assert "products on matrix units are not known" in str(prediction(bound._replace(terms=terms), H200, known))


KINDS = (
    "tiles there, from the caller's parameters",
    "tiles there",
    "sums there",
    "tiles of the query set",
    "sums of the query set",
    "tiles back",
    "sums back",
)


def test_launches_of_tiles_have_gaps_and_share_the_cache() -> None:
    """Two steps of four tiles; every kind of launch takes 1000 clocks, but the way back's, of which a block copies."""
    widths = (2, 64, 64, 64, 3)
    bound = bound_of(widths, tasks=1, support=128, query=32)
    each = clocks(1000.0, 1000.0, 100.0)
    known = [Row("H200", widths, name, 1, 0, 0, (1, 1), (each, each)) for name in KINDS]
    launches = 2 + 2 + 1 + 1 + 2 + 2
    expected = ENDS_SECONDS - GAP_SECONDS + launches * (GAP_SECONDS + 1000 / H200.hertz)
    assert seconds_of(prediction(bound, H200, tuple(known))) == pytest.approx(expected)
    known[5] = known[5]._replace(clocks=(each._replace(copied=1e5),) * 2)
    copies = 2 * 1e5 / (H200.l2_bandwidth / H200.processors)
    assert seconds_of(prediction(bound, H200, tuple(known))) == pytest.approx(expected + copies)


def test_the_table_has_the_kernels_that_were_predicted() -> None:
    """Its numbers are those of a command that compiles; here they only have to hang together."""
    assert {each.device for each in rows()} <= {device.name for device in DEVICES.values()}
    assert {each.widths for each in rows() if each.device == "H200"} >= {WIDTHS, (2, 100, 100, 2)}
    for each in rows():
        low, high = each.clocks
        assert 0 < low.chain <= low.alone and each.resident >= 1
        if each.at[1] > each.at[0]:
            assert high.alone > low.alone
    times = [seconds_of(prediction(bound_of(tasks=tasks, steps=5), H200)) for tasks in (1, 25, 133, 4096)]
    assert times == sorted(times) and times[0] == times[1]
    assert 15e-6 < times[1] < 30e-6  # bench/LADDER.md: 22 us


# --- explain() --------------------------------------------------------------------------------------------------------


def sinusoid(width: int = 40) -> tuple[MAML, list[torch.Tensor]]:
    net = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, 1))
    return MAML(net, 0.01, steps=5, loss="mse", backend="torch"), [torch.randn(4, 10, 1) for _ in range(4)]


def test_explain_says_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "DeviceKernels", lambda chip_of, tf32: HostKernels())
    maml, batch = sinusoid()
    said = maml.explain(*batch).launch
    assert "on an H200: the kernel of perceptrons 1-40-40-1, 2 samples a warp" in said
    assert "; predicted " in said and " us, bound by " in said


def test_explain_says_why_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "DeviceKernels", lambda chip_of, tf32: HostKernels())
    maml, batch = sinusoid(44)
    said = maml.explain(*batch).launch
    assert "plain kernel" in said and "predicted" not in said
    assert "no kernel of perceptrons, for the widths are 1-44-40-1 (with a piecewise linear activation" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"masks": ("some", "none")}, "there are masks"),
        ({"step_weights": True}, "the losses of all steps are weighed"),
        ({"lr": "element"}, "elements of a tensor have rates of their own"),
        ({"query": None}, "there is no query set"),
        ({"keep": 1}, "adapted parameters are handed out"),
        ({"first_order": True}, "gradients of rates are wanted of first order"),
        ({"loss": LossSpec("cross_entropy")}, "a loss is not one of elements (mse, bce_with_logits, huber, l1)"),
    ],
)
def test_why_a_call_has_no_kernel(options: dict[str, Any], why: str) -> None:
    a = call_of([1, 40, 40, 3 if "loss" in options else 1], **options)
    perceptrons = Perceptrons(HostKernels())
    assert perceptrons.bound(a) is None and why in perceptrons.why_not(a)


def test_a_gpu_without_room_is_said() -> None:
    small = HostKernels()
    small.chip = lambda device: Chip(132, 1024, 2048)  # type: ignore[method-assign]
    a = call_of([1, 40, 40, 1], loss=LossSpec("mse"))
    assert "a block of theirs does not fit this GPU" in Perceptrons(small).why_not(a)
