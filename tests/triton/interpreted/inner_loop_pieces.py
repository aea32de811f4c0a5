"""Tests of gradients in pieces of their depth, through Triton's interpreter: test_triton_inner_loop.py runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases.schedule_kernels import scattered
from cases.triton_watch import permuted, poison, products_in_order, unwritten, watched
from inner_loop_fused import both_ways, by_torch, call_of, strided
from torch import Tensor, nn

import mtml
from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule, Source
from mtml_kernels.schedule.kernels import Convolution, Linear
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.triton.inner_loop import bound, launching, policy
from mtml_kernels.triton.inner_loop.jobs import Job
from mtml_kernels.triton.inner_loop.launching import LaunchKernel

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop.py, which sets the interpreter up"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STRIDED = (9.0, 8.0, 5.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0)  # 3 x 3, padded, two groups
RATE = 0.1


class Gradients(NamedTuple):
    """Of one layer: its constants, and the shapes of d, x and w."""

    family: str
    constants: Any
    d: tuple[int, ...]
    x: tuple[int, ...]
    w: tuple[int, ...]

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        """d, dt, x, xt, w, wt, rate, and a sum to go on with."""
        torch.manual_seed(3)
        own = [scattered(*shape).to(dtype) for shape in (self.d, self.d, self.x, self.x, self.w, self.w)]
        return [*own, torch.tensor(RATE, dtype=dtype), torch.randn(self.w, dtype=dtype)]

    def schedule(self, dtype: torch.dtype, tangents: bool) -> Schedule:
        """A step along dw, or its tangent added to a sum; and db, which nobody reads."""
        results = [self.w, (self.w[0], 1, self.d[3]), self.w]
        planes = [Plane(tuple(t.shape), t.dtype, "", Source("x", i)) for i, t in enumerate(self.operands(dtype))]
        dw, db, after = range(len(planes), len(planes) + 3)
        planes += [Plane(shape, dtype, "") for shape in results]
        if tangents:
            first = Part(f"{self.family}.back_tangent", (0, 1, 2, 3, 4, 5), (ABSENT, dw, db), self.constants)
            then = Part("accumulate", (7, dw), (after,))
        else:
            first = Part(f"{self.family}.backward", (0, 2, 4), (ABSENT, dw, db), self.constants)
            then = Part("update.step", (7, dw, 6), (after,))
        return Schedule(tuple(planes), (Call((first, then), "here"),), (db, after))


CASES = {
    "own": Gradients("linear", Linear(False, False), (2, 7, 11, 5), (2, 7, 11, 3), (2, 5, 3)),
    "turned": Gradients("linear", Linear(True, False), (2, 7, 11, 5), (2, 7, 11, 3), (2, 3, 5)),
    "summed over tasks": Gradients("linear", Linear(False, True), (3, 7, 11, 5), (3, 7, 11, 3), (1, 5, 3)),
    "convolution": Gradients("conv", Convolution(STRIDED, False), (2, 4, 20, 6), (2, 4, 72, 4), (2, 6, 18)),
    "convolution summed": Gradients("conv", Convolution(STRIDED, True), (2, 4, 20, 6), (2, 4, 72, 4), (1, 6, 18)),
}
every_case = pytest.mark.parametrize("name, tangents", [(name, flag) for name in CASES for flag in (False, True)])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one block, and results that start as NaN."""
    monkeypatch.setattr(policy, "TURNS", (1, 1))
    monkeypatch.setattr(policy, "ADDED", (1, 2))


def jobs_of(launches: Bound) -> Iterator[Job]:
    """Of all launches."""
    for kernel, *_ in launches.steps:
        if isinstance(kernel, LaunchKernel):
            yield from kernel.launch.jobs


def results_of(launches: Bound, schedule: Schedule, tensors: list[Tensor]) -> list[Tensor]:
    """On copies, for sums go on in place."""
    given = [t.clone() for t in tensors]
    found = launches.run(lambda plane: given[plane.source[1]], {})  # type: ignore[index]
    return [t for i in schedule.results if (t := found[i]) is not None]


@every_case
def test_equal_to_the_whole_depth(name: str, tangents: bool) -> None:
    case = CASES[name]
    schedule, tensors = case.schedule(torch.float64, tangents), case.operands(torch.float64)
    launches = bound(schedule)
    pieces = [job.pieces for job in jobs_of(launches) if job.product is not None or not job.of_shares]
    assert max(pieces) >= 3
    got = results_of(launches, schedule, tensors)
    for mine, right in zip(got, results_of(Bound.of(schedule, TORCH), schedule, tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_programs_share_no_memory_and_write_all_of_theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def empty(*args: Any, **options: Any) -> Tensor:
        made.append(poison(torch.empty(*args, **options)))
        return made[-1]

    monkeypatch.setattr(launching, "empty", empty)
    case = CASES[name]
    schedule, tensors = case.schedule(torch.float32, True), case.operands(torch.float32)
    launches = bound(schedule)
    expected = results_of(launches, schedule, tensors)
    with watched() as watch, permuted(1):
        found = results_of(launches, schedule, tensors)
    assert watch.launches == 2 and not watch.conflicts and not sum(map(unwritten, made))
    assert all(torch.equal(got, right) for got, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["own", "convolution"])
def test_a_task_depends_on_no_other(name: str) -> None:
    case, dtype = CASES[name], torch.float32
    alone = case._replace(d=(1, *case.d[1:]), x=(1, *case.x[1:]), w=(1, *case.w[1:]))
    tensors = case.operands(dtype)
    second = [t[1:] if t.ndim else t for t in tensors]
    with products_in_order():
        both, one = (
            results_of(bound(schedule), schedule, given)
            for schedule, given in ((case.schedule(dtype, True), tensors), (alone.schedule(dtype, True), second))
        )
    assert all(torch.equal(mine[1:], own) for mine, own in zip(both, one, strict=True))


@pytest.mark.parametrize("name", ["turned", "summed over tasks", "convolution"])
def test_float32_is_as_good_as_pytorchs(name: str) -> None:
    """The step along a product's pieces. Not the sums of rows, which NumPy adds up in another order than a GPU."""
    case = CASES[name]
    case = case._replace(d=(case.d[0], 20, *case.d[2:]), x=(case.x[0], 20, *case.x[2:]))
    schedule, tensors = case.schedule(torch.float64, False), case.operands(torch.float32)
    exact = results_of(Bound.of(schedule, TORCH), schedule, wide(case))[1]
    narrow = case.schedule(torch.float32, False)
    ours, theirs = (
        float((results_of(launches, narrow, tensors)[1].double() - exact).norm())
        for launches in (bound(narrow), Bound.of(narrow, TORCH))
    )
    assert ours <= 2 * theirs


def wide(case: Gradients) -> list[Tensor]:
    """The operands in float32, as float64 has them."""
    return [t.double() for t in case.operands(torch.float32)]


def waiting_schedule() -> tuple[Schedule, list[Tensor]]:
    """Three gradients: a step along the first, a sum with the second, and the third added to the first in place."""
    shapes = [(2, 7, 11, 5), (2, 7, 11, 3), (2, 5, 3), (), (2, 5, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    planes = [Plane(shape, torch.float64, "", Source("x", i)) for i, shape in enumerate(shapes)]
    planes += [Plane((2, 5, 3), torch.float64, "") for _ in range(7)]
    calls = [Call((Part("linear.backward", (0, 1, 2), (ABSENT, 5, ABSENT), Linear(False, False)),), "first")]
    calls.append(Call((Part("update.step", (2, 5, 3), (8,)),), "step"))
    backward = Part("linear.backward", (0, 1, 2), (ABSENT, 6, ABSENT), Linear(False, False))
    calls.append(Call((backward, Part("add.forward", (4, 6), (9,))), "second", drops=(4,)))
    calls.append(Call((Part("linear.backward", (0, 1, 2), (ABSENT, 7, ABSENT), Linear(False, False)),), "third"))
    calls.append(Call((Part("scale", (9, 3), (10,)), Part("accumulate", (5, 7), (11,))), "end", drops=(5, 7, 9)))
    return Schedule(tuple(planes), tuple(calls), (6, 8, 10, 11)), tensors


def test_gradients_wait_for_who_reads_them() -> None:
    """One launch puts all together and goes on with them; only then is the first changed in place, and what a call has
    let go of is there still.
    """
    schedule, tensors = waiting_schedule()
    launches = bound(schedule)
    found = results_of(launches, schedule, tensors)
    for mine, right in zip(found, results_of(Bound.of(schedule, TORCH), schedule, tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
    kernels = [kernel for kernel, *_ in launches.steps if isinstance(kernel, LaunchKernel)]
    assert [len(kernel.launch.jobs) for kernel in kernels] == [1, 1, 1, 3, 1]


def test_a_network_of_convolutions_with_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "empty", lambda *args, **options: poison(torch.empty(*args, **options)))
    call, cut = call_of(strided, torch.float64), []

    def bind(schedule: Schedule) -> Bound:
        launches = bound(schedule)
        cut.extend(job for job in jobs_of(launches) if job.pieces > 1)
        return launches

    for mine, right in zip(both_ways(call, bind), both_ways(call, by_torch), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
    assert {job.product is None for job in cut if not job.of_shares} == {True, False}


def steps_of(backend: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Losses and meta-gradients of two steps, by 70 samples a task."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x, y = torch.randn(2, 2, 70, 3, dtype=dtype), torch.randn(2, 2, 70, 2, dtype=dtype)
    maml = mtml.MAML(net, lr=0.05, steps=2, loss="mse", backend=backend, **options)
    losses = maml.meta_loss(x[0], y[0], x[1], y[1])
    return [losses, *torch.autograd.grad(losses.sum(), list(net.parameters()))]


@pytest.mark.parametrize("options", [{}, {"update": mtml.inner.SGD(momentum=0.9)}], ids=["plain", "momentum"])
def test_steps_in_turn(options: dict[str, Any]) -> None:
    """Sums and what goes along with them wait for the end of a step: no operand is let go of before, none changed."""
    exact = steps_of("torch", torch.float64, **options)
    with watched() as watch, permuted(2):
        found = steps_of("triton", torch.float64, **options)
    assert not watch.conflicts
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


def test_no_tasks_and_no_samples() -> None:
    for shape in ((0, 7, 11), (2, 0, 11)):
        case = Gradients("linear", Linear(False, True), (*shape, 5), (*shape, 3), (1, 5, 3))
        schedule, tensors = case.schedule(torch.float64, False), case.operands(torch.float64)
        assert all(job.pieces == 1 for job in jobs_of(bound(schedule)) if not job.of_shares) or shape[1]
        got = results_of(bound(schedule), schedule, tensors)
        for mine, right in zip(got, results_of(Bound.of(schedule, TORCH), schedule, tensors), strict=True):
            torch.testing.assert_close(mine, right)
