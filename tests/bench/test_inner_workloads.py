"""The inner-loop workloads at tiny sizes: every provider agrees with plain autograd in float64."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.__main__ import main  # noqa: E402
from bench.measure import flops, match, memory, runner  # noqa: E402
from bench.providers import inner as providers  # noqa: E402
from bench.providers.base import Result  # noqa: E402
from bench.report import readme, record  # noqa: E402
from bench.workloads.inner import WORKLOADS, InnerWorkload, make_problem, tiny  # noqa: E402

OPTIONS = runner.Options(dtype=torch.float64)
PLAIN = ("mtml", "loop", "vmap", "vmap:loop", "loop:channels_last")
OF_GOAL = {"query": ("loop:per_task",), "adapt": (), "expert": ("loop:checkpoint", "vmap:checkpoint")}


def outcome(w: InnerWorkload, provider: str, seed: int = 0) -> Result:
    return runner.outcome(runner.prepare(w, provider, torch.float64, "cpu", seed))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_provider_matches_the_plain_loop(name: str) -> None:
    w = tiny(name)
    gate = runner.gate_for(replace(w, oracle="loop"), OPTIONS)
    for provider in (*PLAIN, *OF_GOAL[w.goal]):
        prepared, record = runner.admit(w, provider, OPTIONS, gate)
        assert prepared is not None, (provider, record.status, record.note)
        assert record.note == "", (provider, record.note)  # no fallback of ours


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["compile", "compile:loop", "compile:checkpoint", "jax", "jax:map"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_compiled_providers_match_the_plain_loop(name: str, provider: str) -> None:
    if provider.startswith("jax"):
        pytest.importorskip("jax")
    options = runner.Options()
    prepared, record = runner.admit(tiny(name), provider, options, runner.gate_for(tiny(name), options))
    assert prepared is not None, (record.status, record.note)


def changed(w: InnerWorkload) -> list[InnerWorkload]:
    """Workloads that differ from this one in what makes it one."""
    found = [replace(w, lr=1.1 * w.lr)] + ([] if w.rates else [replace(w, steps=w.steps - 1)])
    if w.update == "adam":
        found.append(replace(w, update="sgd"))
    if w.own_starts:
        found.append(replace(w, own_starts=False))
    return found


@pytest.mark.parametrize("name", WORKLOADS)
def test_gate_notices_another_loop(name: str) -> None:
    w = tiny(name)
    gate = runner.gate_for(w, OPTIONS)
    for other in changed(w):
        result = outcome(other, "loop", gate.seed)
        fitting = [g.expand_as(t) for g, t in zip(result[1], gate.truth(gate.seed).grads, strict=True)]
        assert not gate.truth(gate.seed).judge((result[0], fitting)).score <= 1


def test_data_of_every_step_is_used() -> None:
    w = tiny("fedavg")
    problem = make_problem(w, torch.float64, "cpu")
    assert problem.sx.shape == (w.tasks, w.steps, w.support, *w.x)
    same = replace(w, per_step=False)  # the first step's data at every step would move the weights elsewhere
    truth = match.Truth(outcome(w, "loop"), outcome(w, "loop"), match.SLACK[torch.float64])
    assert not truth.judge(outcome(same, "loop")).score <= 1


def test_data_and_starts_do_not_depend_on_the_dtype() -> None:
    for name in WORKLOADS:
        single, double = (make_problem(tiny(name), dtype, "cpu", 3) for dtype in (torch.float32, torch.float64))
        torch.testing.assert_close(single.sx, double.sx.float())
        for tensor in single.start:
            torch.testing.assert_close(single.start[tensor], double.start[tensor].float())


@pytest.mark.parametrize(
    ("name", "gflop"),
    [
        ("omniglot_mlp_adam", 4.52),
        ("nef_fit", 38.9),
        ("fedavg", 49.4),
        ("distill", 808),
        ("functa", 452),
        ("coinpp", 203),
        ("anil_fc100", 29.27),
        ("metasdf", 77.6),
    ],
)
def test_flops(name: str, gflop: float) -> None:
    assert flops.inner_loop(WORKLOADS[name]) / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert flops.inner_loop_bytes(WORKLOADS[name]) > 1e6


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="expected options among"):
        providers.prepare(tiny("fedavg"), "loop:nothing", torch.float32, "cpu", 0)
    with pytest.raises(providers.Unavailable, match="there are mtml"):
        providers.prepare(tiny("fedavg"), "higher", torch.float32, "cpu", 0)


def test_memory_and_checksums_know_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checksum", "fedavg", "--here", "--threads", "1"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["fedavg", "fedavg"]
    assert main(["memory", "omniglot_mlp_adam", "--here", "--steps", "1", "--providers", "mtml", "--threads", "1"]) == 0
    assert float(capsys.readouterr().out) >= 0  # 0 where tests before it left this process memory enough


@pytest.mark.slow
def test_memory_of_a_process_of_its_own() -> None:
    usage = memory.measure("omniglot_mlp_adam", "mtml", 1, 1)
    assert usage.megabytes > 0, usage.error


def test_readme_table() -> None:
    row = record.Record("nef_fit", "mtml", "ok", ms=2.0, threads=2, dtype="float32", date="2026-01-02", peak_gflops=1.0)
    rows = [row, replace(row, provider="jax", ms=8.0), replace(row, provider="loop:per_task", ms=90.0)]
    text = readme.table([replace(r, share_of_peak=0.5) for r in rows])
    assert (
        "| nef_fit | SIREN 2-8-8-1; Adam, own starts, no meta-gradient | 90 ms | 8 ms (jax) | 2 ms | **4.0x** |" in text
    )
    assert "each one's result matched" in text
