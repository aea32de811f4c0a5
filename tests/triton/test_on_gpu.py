"""The Triton kernels on the GPU itself, against plain PyTorch in float64: the gate of ``python -m bench gpu``.

The checks are those of the benchmarks (``bench/measure/match.py``) at sizes that take a second together; what runs them
on the CPU, with kernels that are right and with kernels that are not, shows that they can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases.on_gpu import ORDERS, SMALL, check_meta_step, check_order, needs_gpu
from torch import Tensor

from bench.gpu import multihead_loss as heads
from bench.gpu.head_inner_loop import Shape, draw_case, step
from bench.gpu.head_inner_loop import error as head_error
from bench.gpu.losses import Admission
from bench.gpu.precision import full_precision
from bench.measure import runner
from bench.workloads.heads import Draw
from mtml_kernels import task_conv2d, task_linear
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.schedule.graphs import Graphs

gpu = pytest.mark.gpu
needs_backend = pytest.mark.skipif("triton" not in BACKENDS.names(), reason="inner_loop has no Triton backend")


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    with full_precision():
        yield


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


def check_layers(backend: str, device: str) -> None:
    """Values and gradients of the building blocks, in float64."""
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 7, 33), torch.randn(3, 17, 33), torch.randn(3, 17)
    images, kernels = torch.randn(2, 3, 4, 9, 8), torch.randn(2, 6, 2, 3, 3)
    conv = partial(task_conv2d, stride=2, padding=1, groups=2)
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (partial(task_linear, activation="gelu"), [x, w, b]),
        (conv, [images, kernels]),
    ]
    for call, tensors in calls:
        found = []
        for name, place in ((backend, device), ("reference", "cpu")):
            leaves = [t.to(place, torch.float64).requires_grad_() for t in tensors]
            y = call(*leaves, backend=name)
            found.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))])
        torch.testing.assert_close(*found)


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


@gpu
@needs_gpu
@needs_backend
@pytest.mark.parametrize("order", ORDERS)
def test_recorded_calls_in_any_order(order: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[bool] = []
    plainly = Graphs.forward

    def forward(self: Graphs, *args: Any) -> Any:
        found = plainly(self, *args)
        replayed.append(found is not None)
        return found

    monkeypatch.setattr(Graphs, "forward", forward)
    check_order("triton", "cuda", order, monkeypatch)
    assert sum(replayed) >= 2 * len(order), "nothing was recorded"


@gpu
@needs_gpu
@needs_backend
def test_building_blocks() -> None:
    check_layers("triton", "cuda")


ELSEWHERE: dict[str, Callable[[str, pytest.MonkeyPatch], None]] = {
    "meta-step": lambda device, _: check_meta_step(SMALL["sinusoid"], "mtml:triton", device),
    "convolutions": lambda device, _: check_meta_step(SMALL["conv"], "mtml:triton", device),
    "recorded": lambda device, patch: check_order("triton", device, ORDERS[0], patch),
    "layers": lambda device, _: check_layers("triton", device),
    "losses": lambda device, _: check_losses("odd", "mtml", device, torch.float32),
    "head": lambda device, _: check_head("mtml", device),
}


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@needs_backend
@pytest.mark.parametrize("what", ELSEWHERE)
def test_on_another_gpu_than_the_current_one(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a recording on the current one, whose stream PyTorch keeps for later captures."""
    check_order("triton", "cuda:0", ORDERS[0], monkeypatch)
    ELSEWHERE[what]("cuda:1", monkeypatch)
    assert torch.cuda.current_device() == 0


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


@pytest.mark.parametrize("order", ORDERS)
def test_right_orders_pass(order: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    check_order("torch", "cpu", order, monkeypatch)


def test_right_building_blocks_pass() -> None:
    check_layers("torch", "cpu")


def test_a_right_head_passes() -> None:
    check_head("vmap", "cpu")
