"""``python -m bench predict``: the schedule's counts agree with the formulas of bench/measure/flops.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure import flops  # noqa: E402
from bench.report import predict as predicting  # noqa: E402
from bench.workloads import WORKLOADS, Workload  # noqa: E402
from mtml_kernels.schedule.describe import Description  # noqa: E402
from mtml_kernels.schedule.devices import DEVICES  # noqa: E402

# Launches on a GPU that a meta-step of each may take at most.
MOST_CALLS = {"sinusoid": 68, "siren": 58, "omniglot_mlp": 42, "omniglot_conv": 80, "mini_conv": 310}


def described(w: Workload) -> Description:
    return predicting.predict(w, DEVICES["h200"], "fp32")


@pytest.mark.parametrize("name", ["sinusoid", "siren", "omniglot_mlp", "omniglot_conv", "mini_conv", "tiny"])
def test_products_are_those_of_the_formula(name: str) -> None:
    """To the FLOP: both count what exists, taps outside an image among them. All else is a tenth more at most."""
    w = WORKLOADS[name]
    found = described(w)
    products = sum(product.flops for line in found.lines for product in line.cost.products)
    assert products == flops.meta_step(w, "all")
    assert products < found.flops < 1.15 * products or name == "tiny"


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_products_at_any_number_of_steps(steps: int) -> None:
    w = replace(WORKLOADS["siren"], steps=steps)
    assert sum(p.flops for line in described(w).lines for p in line.cost.products) == flops.meta_step(w)


def test_gradients_for_inputs_take_products_of_the_first_layer() -> None:
    w = replace(WORKLOADS["sinusoid"], inputs=True)
    assert sum(p.flops for line in described(w).lines for p in line.cost.products) == flops.meta_step(w)


@pytest.mark.parametrize("name", MOST_CALLS)
def test_calls_bytes_and_times(name: str) -> None:
    w = WORKLOADS[name]
    found = described(w)
    assert len(found.lines) <= MOST_CALLS[name]
    assert found.bytes > flops.meta_step_bytes(w)
    assert found.seconds > len(found.lines) * 2.2e-6 and sum(found.by_bound.values()) == pytest.approx(found.seconds)
    slower = predicting.predict(w, DEVICES["a100"], "fp32")
    assert slower.seconds > found.seconds and (slower.flops, slower.bytes) == (found.flops, found.bytes)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "sinusoid", "omniglot_mlp", "--device", "l4", "--precision", "3xtf32"]) == 0
    first, *_, columns, sinusoid, omniglot = capsys.readouterr().out.splitlines()
    assert "L4, 3xtf32" in first and columns.split()[:5] == ["workload", "calls", "GFLOP", "MB", "us"]
    assert sinusoid.split()[:2] == ["sinusoid", "68"] and sinusoid.split()[-1] == "launch"
    assert omniglot.split()[0] == "omniglot_mlp"
    times = [float(field) for field in omniglot.split()[4:9]]
    assert times[0] == pytest.approx(sum(times[1:]), abs=3)


def test_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "tiny", "--calls"]) == 0
    found = described(WORKLOADS["tiny"])
    lines = capsys.readouterr().out.splitlines()[-len(found.lines) :]
    assert lines == list(map(str, found.lines))
    assert all("step" in line or "losses" in line or "sums" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--form", "tf32"], "form, table: expected with --backend cuda"),
        (["--table"], "form, table: expected with --backend cuda"),
        (["--backend", "cuda", "--form", "tf32", "--interpreted"], "form: expected without --interpreted"),
        (["--backend", "cuda", "--form", "tf32", "--table"], "table: expected with --device alone"),
        (["siren", "--backend", "cuda", "--table"], "table: expected with --device alone"),
    ],
)
def test_options_of_another_way_are_refused(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The clocks of the table are of kernels in float32."""
    assert main(["predict", *options]) == 2
    assert why in capsys.readouterr().err
