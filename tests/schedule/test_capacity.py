"""Calls that do not fit the memory of a device, which is a number here: cut, exact, and named where nothing helps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.inner_loop import Case, make_case
from schedule.test_graphs import Again
from torch import Tensor

from mtml import MAML, DeviceMemoryError
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.registry import Backend
from mtml_kernels.schedule import backend as scheduled
from mtml_kernels.schedule import capacity
from mtml_kernels.schedule.backend import Scheduled
from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.graphs import Graphs
from mtml_kernels.schedule.pieces import narrowed
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH
from mtml_kernels.schema.inner_loop import (
    KEEP_LAST,
    KEEP_STEPS,
    MOMENTS,
    PER_STEP,
    QUERY_STEPS,
    STARTS,
    InnerLoopArgs,
)
from mtml_kernels.schema.update import UpdateSpec

ADAM = UpdateSpec("adam", clipped=True)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"masks": True, "lr": "element_per_step", "step_weights": True},
    "classes": {"loss": LossSpec("cross_entropy"), "steps": 3},
    "last": {"keep": KEEP_LAST, "query": 0},
    "every step": {"keep": KEEP_STEPS, "axes": QUERY_STEPS},
    "starts": {"axes": STARTS | PER_STEP, "adapted": [True, False, True, True]},
    "adam": {"update": ADAM, "moments": True, "keep": KEEP_LAST, "axes": MOMENTS},
    "first order": {"first_order": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


class Memory:
    """So many bytes are free; `tasks`: of each piece there and back."""

    def __init__(self) -> None:
        self.free: int | None = None
        self.there: list[int] = []
        self.back: list[int] = []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    found, forward, backward = Memory(), Scheduled._forward, Scheduled._backward

    def there(self: Scheduled, a: InnerLoopArgs, *rest: Any, **options: Any) -> Any:
        found.there.append(a.tasks)
        return forward(self, a, *rest, **options)

    def back(self: Scheduled, a: InnerLoopArgs, *rest: Any, **options: Any) -> Any:
        found.back.append(a.tasks)
        return backward(self, a, *rest, **options)

    monkeypatch.setattr(Scheduled, "_forward", there)
    monkeypatch.setattr(Scheduled, "_backward", back)
    monkeypatch.setattr(capacity, "SMALL", 0)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: found.free)
    yield found


def arguments(case: Case, needs: int = 15) -> InnerLoopArgs:
    return InnerLoopArgs.of_schema(case.op_arguments(needs))


def enough_for(case: Case, tasks: int) -> int:
    """Bytes for so many tasks, and no more."""
    a = arguments(case, 15 | 16 | 32 if case.hyper else 15)
    return int(capacity.needed_bytes(plan_of(narrowed(a, range(tasks)))) / capacity.SHARE) + 1


def outcome(case: Case, backend: str = "torch") -> list[Tensor]:
    """All outputs, and the gradients of all that has one, from a cotangent for every element."""
    case = case.requiring_grad()
    loss, output, support_losses, kept = case.call(backend)
    outputs = [t for t in (loss, output, support_losses, *kept) if t.numel() and t.requires_grad]
    total = sum((torch.linspace(0.1, 1.0, t.numel()).view(t.shape).to(t.dtype) * t).sum() for t in outputs)
    leaves = case.tensors()
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [t.detach() for t in outputs]
    return [*found, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


# --- cut calls are exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_whole(name: str, memory: Memory) -> None:
    case = make_case(tasks=5, **CASES[name])
    whole = outcome(case)
    assert (memory.there, memory.back) == ([5], [5])
    memory.there, memory.back, memory.free = [], [], enough_for(case, 2)
    near = 2e-2 if name == "bfloat16" else 1e-12
    for got, expected in zip(outcome(case), whole, strict=True):
        assert got.dtype == expected.dtype and got.is_contiguous()
        torch.testing.assert_close(got, expected, rtol=near, atol=near)
    assert max(memory.there) < 5 and max(memory.back) < 5 and sum(memory.there) == sum(memory.back) == 5


def test_sums_of_half_precision_are_rounded_once(memory: Memory) -> None:
    case = make_case(tasks=32, dtype=torch.bfloat16)
    memory.free = enough_for(case, 1)
    cut = outcome(case)
    assert memory.back == [1] * 32
    memory.free = None
    whole = outcome(case)
    wide = outcome(dataclasses.replace(case, **as_double(case)))
    weights = slice(len(whole) - len(case.tensors()), None)
    for got, expected, right in zip(cut[weights][:4], whole[weights][:4], wide[weights][:4], strict=True):
        assert (got - right).abs().max() <= 2 * (expected - right).abs().max() + 1e-6


def as_double(case: Case) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(t) for t in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {f.name: wide(getattr(case, f.name)) for f in dataclasses.fields(case) if f.name != "spec"}


def test_equal_inputs_and_equal_memory_give_equal_bits(memory: Memory) -> None:
    case = make_case(tasks=7)
    memory.free = enough_for(case, 2)
    assert all(map(torch.equal, outcome(case), outcome(case)))


def test_the_way_back_is_cut_alone_where_memory_has_run_short_since(memory: Memory) -> None:
    case = make_case(tasks=4).requiring_grad()
    loss = case.call("torch")[0]
    whole = torch.autograd.grad(loss.sum(), case.params, retain_graph=True)
    memory.free = enough_for(case, 1)
    cut = torch.autograd.grad(loss.sum(), case.params)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
    assert memory.there == [4] and memory.back == [4, 1, 1, 1, 1]


def test_a_task_too_many_is_noticed(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: pieces that overlap are another sum."""
    case = make_case(tasks=4)
    whole = outcome(case)
    memory.free = enough_for(case, 2)
    monkeypatch.setattr(scheduled, "cuts", lambda tasks, size: [range(2), range(2)])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(outcome(case), whole)


# --- when -------------------------------------------------------------------------------------------------------------


def test_nothing_is_cut_without_need(memory: Memory) -> None:
    case = make_case(tasks=5)
    memory.free = enough_for(case, 5)
    outcome(case)
    assert (memory.there, memory.back) == ([5], [5])


def test_nobody_asks_for_a_small_call(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "SMALL", 1 << 20)
    memory.free = 1
    outcome(make_case(tasks=5))
    assert memory.there == [5]


def test_what_is_recorded_has_its_memory(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not: the pieces of another call, which no recording keeps."""
    recorder = Again()
    made = Scheduled(lambda schedule: Bound.of(schedule, TORCH), Graphs(recorder))
    monkeypatch.setattr(scheduled, "wanted", lambda device, peak: "here")
    BACKENDS.register(Backend("recorded", lambda: None, made.forward, made.backward))
    case, other = make_case(tasks=4).requiring_grad(), make_case(tasks=6).requiring_grad()

    def step(of: Case) -> list[Tensor]:
        memory.there, memory.back = [], []
        loss = of.call("recorded")[0]
        return [loss, *torch.autograd.grad(loss.sum(), of.params)]

    try:
        first, *_ = [step(case) for _ in range(5)]  # met, then recorded in two workspaces
        recorded, memory.free = recorder.recorded, enough_for(case, 1)
        assert all(map(torch.equal, step(case), first))
        assert (memory.there, memory.back) == ([4], [4])
        step(other)
        assert sum(memory.there) == 6 and len(memory.there) > 1 and recorder.recorded == recorded
    finally:
        BACKENDS.unregister("recorded")


@pytest.mark.parametrize("tasks", [1, 6])
def test_planes_are_counted_as_they_are(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all tensors that are alive in a run, against `peak_bytes`: no less, and not many more."""
    a = arguments(make_case(tasks=tasks, support=40, query=30, steps=4))
    schedule = plan_of(a).there
    most = 0

    def counting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(part: Any, *operands: Any) -> Any:
            nonlocal most
            results = kernel(part, *operands)
            alive.append(results)
            return results

        return run

    alive: list[Any] = []
    bound = Bound.of(schedule, {name: counting(kernel) for name, kernel in TORCH.items()})
    given = scheduled.Arguments(a)
    outside = {t.untyped_storage().data_ptr() for t in (given(plane) for _, plane in bound.arguments)}
    for stop in range(len(bound.steps)):
        memory = bound._replace(steps=bound.steps[: stop + 1]).run(given, {})
        alive.clear()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in memory if t is not None}
        most = max(most, sum(size for at, size in held.items() if at not in outside))
    assert most <= schedule.peak_bytes <= 2 * most


# --- where nothing helps ----------------------------------------------------------------------------------------------


def test_not_even_one_task(memory: Memory) -> None:
    case = make_case(tasks=3, steps=2)
    memory.free = 10
    with pytest.raises(DeviceMemoryError) as raised:
        outcome(case)
    words = str(raised.value)
    assert "one task needs" in words and "where 0.00 MiB are free (2 steps, 3 support samples)" in words
    assert "fewer steps than 2, first_order=True, a smaller query or support set" in words
    assert isinstance(raised.value, torch.OutOfMemoryError)
    memory.free = None
    loss = case.requiring_grad().call("torch")[0]
    memory.free = 10
    with pytest.raises(DeviceMemoryError, match="one task needs"):
        loss.sum().backward()


def test_ways_out_that_are_none_are_not_named(memory: Memory) -> None:
    memory.free = 10
    with pytest.raises(DeviceMemoryError) as raised:
        outcome(make_case(tasks=1, steps=1, first_order=True))
    assert "fewer steps" not in str(raised.value) and "first_order" not in str(raised.value)


def test_the_allocators_error_gets_the_same_words(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 KiB.")

    case = make_case(tasks=3).requiring_grad()
    loss = case.call("torch")[0]
    monkeypatch.setattr(Bound, "run", full)
    with pytest.raises(DeviceMemoryError, match=r"3 tasks need .*fewer tasks in a batch.*Tried to allocate"):
        case.call("torch")
    with pytest.raises(DeviceMemoryError, match=r"3 tasks need .*Tried to allocate"):
        loss.sum().backward()


def test_explain_says_how_many_tasks_at_a_time(memory: Memory) -> None:
    maml = MAML(torch.nn.Linear(3, 2), 0.1, steps=2, loss="mse", backend="torch")
    batch = [torch.randn(8, 5, size) for size in (3, 2, 3, 2)]
    assert "at a time" not in maml.explain(*batch).predicted
    memory.free = 1 << 11
    assert "tasks at a time: all 8 need" in maml.explain(*batch).predicted
    memory.free = 1
    assert "one task needs" in maml.explain(*batch).predicted
