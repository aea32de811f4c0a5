"""Tests of the schedule in Triton through its interpreter: test_triton_inner_loop.py runs them elsewhere."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.engine import check, cotangents_of, draft_case, mlp, outputs_of
from cases.engine_random import random_case
from cases.images import random_image_case
from cases.inner_loop import make_case
from cases.triton_watch import permuted, poison, products_in_order, unwritten, watched
from torch import Tensor, nn

import mtml
from mtml_kernels.program.activations import Act
from mtml_kernels.schedule import backend as scheduled
from mtml_kernels.schedule.backend import Scheduled
from mtml_kernels.schedule.call import Call, Part, Plane, Schedule
from mtml_kernels.schema.inner_loop import InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec
from mtml_kernels.triton.inner_loop import launching
from mtml_kernels.triton.inner_loop.fusing import Fused
from mtml_kernels.triton.inner_loop.jobs import Job, Launch, Space

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop.py, which sets the interpreter up"
# The interpreter computes padding, which is masked, in numpy, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# --- equal to the reference, in float64 -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 3, 7, 12, 39, 71])
def test_random_programs(seed: int) -> None:
    rng = random.Random(seed)
    case = random_case(rng, seed % 11)
    check(case, cotangents_of(case, rng), backend="triton")


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_random_networks(seed: int) -> None:
    case = random_image_case(seed)
    check(case, cotangents_of(case, random.Random(seed)), backend="triton")


@pytest.mark.slow
def test_more_random_programs_and_networks() -> None:
    for seed in range(100, 115):
        rng = random.Random(seed)
        case = random_case(rng, seed % 11)
        check(case, cotangents_of(case, rng), backend="triton")
    for seed in range(20, 24):
        case = random_image_case(seed)
        check(case, cotangents_of(case, random.Random(seed)), backend="triton")


@pytest.mark.parametrize("act", list(Act), ids=lambda act: act.name.lower())
def test_every_activation(act: Act) -> None:
    case = draft_case(mlp([3, 5, 2], act), steps=1, lr_scale=0.1)
    ones = [torch.ones_like(t) if i == 0 else None for i, t in enumerate(outputs_of(case, "torch"))]
    check(case, ones, backend="triton")


# --- whole meta-steps of networks in float32 --------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 2))


def convolutions() -> nn.Module:
    block = [nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Conv2d(5, 3, 2), nn.Flatten(), nn.Linear(3, 3))


def pooled() -> nn.Module:
    """Windows side by side, which leave points of the image over."""
    block = [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d((2, 3))]
    return nn.Sequential(*block, nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 3))


NETWORKS: dict[str, Any] = {
    "mse": (perceptron, (3,), "mse", {}),
    "adam": (perceptron, (3,), "mse", {"update": mtml.inner.Adam()}),
    "images": (convolutions, (2, 7, 7), "cross_entropy", {"batch_norm": "batch"}),
    "pooled": (pooled, (2, 8, 8), "cross_entropy", {"batch_norm": "batch"}),
}


def step(name: str, backend: str, dtype: torch.dtype, tasks: int = 2) -> list[Tensor]:
    """Losses and meta-gradients."""
    make, shape, loss, options = NETWORKS[name]
    torch.manual_seed(5)
    net = make().to(dtype)
    x = torch.randn(2, 3, 4, *shape, dtype=dtype)[:, :tasks]
    y = torch.randint(3, (2, 3, 4)) if loss == "cross_entropy" else torch.randn(2, 3, 4, 2, dtype=dtype)
    y = y[:, :tasks]
    maml = mtml.MAML(net, lr=0.05, steps=1 if len(shape) > 1 else 2, loss=loss, backend=backend, **options)
    losses = maml.meta_loss(x[0], y[0], x[1], y[1])
    return [losses, *torch.autograd.grad(losses.sum(), list(net.parameters()))]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Over all numbers together."""
    ours, true = (torch.cat([t.detach().double().flatten() for t in group]) for group in (found, exact))
    return float((ours - true).norm() / true.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_good_as_pytorchs(name: str) -> None:
    exact = step(name, "torch", torch.float64)
    ours, theirs = (error(step(name, backend, torch.float32), exact) for backend in ("triton", "general"))
    assert ours <= 2 * theirs + 1e-6


def test_half_precision() -> None:
    """The interpreter's products in bfloat16 are wrong: there they are taken in float32. Not with Adam, whose first
    step is the sign of a gradient: of one that rounds to 0 on one way alone the rest is noise.
    """
    exact = step("mse", "torch", torch.float32)
    ours, theirs = (error(step("mse", backend, torch.bfloat16), exact) for backend in ("triton", "torch"))
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("name", ["mse", "images", "pooled"])
def test_a_task_depends_on_no_other(name: str) -> None:
    with products_in_order():
        together, alone = (step(name, "triton", torch.float32, tasks)[0] for tasks in (3, 1))
    assert torch.equal(together[:1], alone)


# --- what programs touch ----------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Results start as NaN."""
    made: list[Tensor] = []

    def empty(*args: Any, **options: Any) -> Tensor:
        made.append(poison(torch.empty(*args, **options)))
        return made[-1]

    monkeypatch.setattr(launching, "empty", empty)
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_programs_share_no_memory_and_write_all_of_theirs(name: str, poisoned: list[Tensor]) -> None:
    expected = step(name, "triton", torch.float32)
    with watched() as watch, permuted(3):
        found = step(name, "triton", torch.float32)
    assert watch.launches > 20 and not watch.conflicts
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(poisoned) > 20 and not sum(unwritten(t) for t in poisoned)


def test_a_sum_in_place_beside_its_reader_is_found() -> None:
    """The control: two jobs in one launch, of which one changes what the other reads."""
    planes = [Plane((2, 40, 40), torch.float32, name) for name in "abcd"]
    adds, reads = Part("accumulate", (0, 1), (2,)), Part("add.forward", (0, 1), (3,))
    jobs = [Job(Space((2, 40, 40)), parts=[part]) for part in (adds, reads)]
    kernel = launching.LaunchKernel(Launch(jobs), planes, [2, 3])
    with watched() as watch:
        kernel(kernel.part, torch.ones(2, 40, 40), torch.ones(2, 40, 40))
    assert {conflict.kind for conflict in watch.conflicts} == {"write-read"}


def test_jobs_that_would_disturb_each_other_are_launches_of_their_own() -> None:
    planes = tuple(Plane((2, 40, 40), torch.float32, name) for name in "abcd")
    parts = (Part("accumulate", (0, 1), (2,)), Part("add.forward", (0, 1), (3,)))
    schedule = Schedule(planes, (Call(parts, "here"),), (2, 3))
    assert [len(step.jobs) for step, _ in Fused(schedule).steps if isinstance(step, Launch)] == [1, 1]


def test_a_batch_in_pieces_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every task's results and gradients, as if all had been run at once."""

    def run() -> list[Tensor]:
        case = make_case(tasks=3, dtype=torch.float32, update=UpdateSpec("adam"), lr="element").requiring_grad()
        loss, output, support_losses, _ = case.call("triton")
        inputs = [*case.support_x, *case.query_x]
        return [loss, output, support_losses, *torch.autograd.grad(loss.square().sum(), inputs)]

    with products_in_order():
        whole = run()
    sizes, forward = [], Scheduled._forward

    def there(self: Scheduled, a: InnerLoopArgs, *rest: Any, **options: Any) -> Any:
        sizes.append(a.tasks)
        return forward(self, a, *rest, **options)

    monkeypatch.setattr(Scheduled, "_forward", there)
    monkeypatch.setattr(scheduled, "fits", lambda needed, device: False)
    monkeypatch.setattr(scheduled, "tasks_at_a_time", lambda *_: 2)
    with products_in_order():
        pieces = run()
    assert all(torch.equal(got, expected) for got, expected in zip(pieces, whole, strict=True))
    assert sizes == [2, 1]
