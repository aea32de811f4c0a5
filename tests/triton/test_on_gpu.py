"""The Triton kernels on the GPU itself, against plain PyTorch in float64: the gate of ``python -m bench gpu``.

The checks are those of the benchmarks (``bench/measure/match.py``) at sizes that take a second together; what runs them
on the CPU, with kernels that are right and with kernels that are not, shows that they can fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # bench/ is not installed; last, so that the installed packages are the ones under test

from bench.gpu import multihead_loss as heads  # noqa: E402
from bench.gpu.head_inner_loop import Shape, draw_case, step  # noqa: E402
from bench.gpu.head_inner_loop import error as head_error  # noqa: E402
from bench.gpu.losses import Admission  # noqa: E402
from bench.gpu.precision import full_precision  # noqa: E402
from bench.measure import runner  # noqa: E402
from bench.workloads import WORKLOADS, Workload, convnet  # noqa: E402
from bench.workloads.heads import Draw  # noqa: E402
from mtml_kernels.ops.inner_loop import BACKENDS  # noqa: E402

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
needs_backend = pytest.mark.skipif("triton" not in BACKENDS.names(), reason="inner_loop has no Triton backend")

SMALL: dict[str, Workload] = {
    "sinusoid": replace(WORKLOADS["sinusoid"], tasks=3),
    "odd": replace(WORKLOADS["tiny"], tasks=1, support=1, query=7),
    "omniglot_mlp": replace(WORKLOADS["omniglot_mlp"], tasks=2, query=9),
    "siren_sine": replace(WORKLOADS["siren_sine"], tasks=2, support=65, query=33),
    "conv": replace(
        WORKLOADS["mini_conv"],
        build=lambda: convnet(3, 8, 8 * 2 * 2, 5, depth=2),
        tasks=2,
        query=6,
        x=(3, 9, 9),
        steps=2,
    ),
}


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    with full_precision():
        yield


def check_meta_step(w: Workload, provider: str, device: str, bits: bool = True) -> None:
    """Right, without a fallback to another path, and with `bits` the same bits again."""
    options = runner.Options(device=device)
    prepared, row = runner.admit(w, provider, options, runner.gate_for(w, options))
    assert prepared is not None and row.ok, row.note
    assert row.note == "", row.note
    first, again = runner.outcome(prepared), runner.outcome(prepared)
    same = all(map(torch.equal, [first[0], *first[1]], [again[0], *again[1]]))
    assert same or not bits, "equal inputs, other bits"


def odd(draw: Draw) -> heads.Heads:
    return heads.Heads([draw.leaf(37, 1003)], [draw.labels(1003, 37)], [heads.HeadLoss()])


def linear(draw: Draw) -> heads.Heads:
    return heads.linear_heads(draw, 65, 48, 33, 130)


LOSSES: dict[str, Callable[[Draw], heads.Heads]] = {"odd": odd, "linear": linear, "many_small": heads.many_small}


def check_losses(case: str, provider: str, device: str, dtype: torch.dtype) -> None:
    run, row = Admission(case, LOSSES[case], dtype, device).admit(provider)
    assert run is not None and row.ok, row.note


def check_head(provider: str, device: str) -> None:
    own = draw_case(Shape(3, 7, 9, 65, 5, 4), device)
    truth = step("vmap", own.double())()
    limit = 4 * head_error(step("vmap", own)(), truth) + 1e-6
    assert head_error(step(provider, own)(), truth) <= limit


# --- on the GPU -------------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@needs_backend
@pytest.mark.parametrize("name", SMALL)
def test_inner_loop(name: str) -> None:
    check_meta_step(SMALL[name], "mtml:triton", "cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("name", SMALL)
def test_inner_loop_by_torch(name: str) -> None:
    """The same schedule by PyTorch's kernels: where this fails too, the schedule is wrong and no Triton kernel."""
    check_meta_step(SMALL[name], "mtml:torch", "cuda", bits=False)  # cuDNN adds up in any order


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_multihead_losses(case: str, dtype: torch.dtype) -> None:
    check_losses(case, "mtml", "cuda", dtype)


@gpu
@needs_gpu
def test_head_inner_loop() -> None:
    check_head("mtml", "cuda")


# --- the checks themselves, on the CPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_right_inner_loop_passes(name: str) -> None:
    check_meta_step(SMALL[name], "mtml:torch", "cpu")


def test_a_wrong_inner_loop_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runner.outcome

    def prepared_by_ours(prepared: runner.Prepared) -> runner.Result:
        loss, grads = right(prepared)
        ours = "stored_grads" in prepared.run.__qualname__
        return loss, [g * (1 + 1e-3) for g in grads] if ours else grads

    monkeypatch.setattr(runner, "outcome", prepared_by_ours)
    with pytest.raises(AssertionError, match="times the tolerance"):
        check_meta_step(SMALL["odd"], "mtml:torch", "cpu")


@pytest.mark.parametrize("case", LOSSES)
def test_right_losses_pass_and_wrong_ones_fail(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_losses(case, "eager", "cpu", torch.float32)
    right = heads.pytorch_loss
    truth_first = iter([right] * 2 * len(LOSSES[case](Draw(torch.float32, "cpu", 0)).specs))
    monkeypatch.setattr(heads, "pytorch_loss", lambda *a: next(truth_first, lambda *b: right(*b) * 1.01)(*a))
    with pytest.raises(AssertionError, match="error 1"):
        check_losses(case, "eager", "cpu", torch.float32)


def test_a_right_head_passes() -> None:
    check_head("vmap", "cpu")
