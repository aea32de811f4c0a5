"""What a task's function does beside its result happens once for every task: nothing of it may pass unseen."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mtml

T = 6
SEEN: list[int] = []


class Case(NamedTuple):
    """A function of one task, and what shows how often it ran."""

    fn: Callable[[Tensor], Tensor]
    ran: Callable[[], Any]


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def hit(self) -> None:
        self.count += 1


class Shared:
    count = 0


def acting(act: Callable[[], Any], ran: Callable[[], Any]) -> Case:
    def fn(x: Tensor) -> Tensor:
        act()
        return x.sum()

    return Case(fn, ran)


def captured_generator() -> Case:
    generator = torch.Generator().manual_seed(0)
    return Case(lambda x: x.sum() + torch.randn((), generator=generator), lambda: generator.get_state().tolist())


def write_through_data() -> Case:
    total = torch.zeros(())

    def fn(x: Tensor) -> Tensor:
        total.data.add_(1)
        return x.sum()

    return Case(fn, total.item)


def other_data() -> Case:
    total = torch.zeros(())

    def fn(x: Tensor) -> Tensor:
        total.data = total.data + 1
        return x.sum()

    return Case(fn, total.item)


def ring_buffer() -> Case:
    """A permutation: the same numbers in other places."""
    buffer = torch.arange(17.0)

    def fn(x: Tensor) -> Tensor:
        buffer.data.copy_(buffer.roll(1))
        return x.sum()

    return Case(fn, buffer.tolist)


def bound_append() -> Case:
    log: list[int] = []
    return acting(partial(log.append, 1), lambda: len(log))


def name_of_append() -> Case:
    log = deque[int]()
    append = log.append

    def fn(x: Tensor) -> Tensor:
        append(1)
        return x.sum()

    return Case(fn, lambda: len(log))


def iterator() -> Case:
    numbers = iter(range(1000))

    def fn(x: Tensor) -> Tensor:
        for _ in numbers:
            break
        return x.sum()

    return Case(fn, lambda: next(numbers))


def generator_function() -> Case:
    numbers = (i for i in itertools.count())

    def fn(x: Tensor) -> Tensor:
        numbers.send(None)
        return x.sum()

    return Case(fn, lambda: next(numbers))


def backward_into_a_tensor() -> Case:
    weight = torch.ones(2, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        (weight * x).sum().backward()
        return x.sum()

    return Case(fn, lambda: None if weight.grad is None else weight.grad.tolist())


def backward_into_a_model() -> Case:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)

    def fn(x: Tensor) -> Tensor:
        model(x).sum().backward()
        return x.sum()

    return Case(fn, lambda: None if model.weight.grad is None else model.weight.grad.tolist())


def pythons_random() -> Case:
    own = random.Random(0)
    draw = own.random
    return Case(lambda x: x.sum() * draw(), own.getstate)


def storage() -> Case:
    memory = torch.zeros(4, dtype=torch.uint8).untyped_storage()

    def fn(x: Tensor) -> Tensor:
        memory[0] = memory[0] + 1
        return x.sum()

    return Case(fn, lambda: memory[0])


def memory_view() -> Case:
    memory = memoryview(bytearray(4))

    def fn(x: Tensor) -> Tensor:
        memory[0] += 1
        return x.sum()

    return Case(fn, lambda: memory[0])


def globals_by_name() -> Case:
    SEEN.clear()

    def fn(x: Tensor) -> Tensor:
        globals()["SEEN"].append(1)
        return x.sum()

    return Case(fn, lambda: len(SEEN))


def slots() -> Case:
    own = Slotted()
    return acting(own.hit, lambda: own.count)


def attribute_of_a_class() -> Case:
    Shared.count = 0

    def fn(x: Tensor) -> Tensor:
        Shared.count += 1
        return x.sum()

    return Case(fn, lambda: Shared.count)


def counter() -> Case:
    counts = Counter[str]()

    def fn(x: Tensor) -> Tensor:
        counts["a"] += 1
        return x.sum()

    return Case(fn, lambda: counts["a"])


def hook() -> Case:
    torch.manual_seed(0)
    model, calls = nn.Linear(2, 1), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    return Case(lambda x: model(x).sum(), lambda: len(calls))


CASES = [
    captured_generator, write_through_data, other_data, ring_buffer, bound_append, name_of_append, iterator,
    generator_function, backward_into_a_tensor, backward_into_a_model, pythons_random, storage, memory_view,
    globals_by_name, slots, attribute_of_a_class, counter, hook,
]  # fmt: skip


@pytest.mark.parametrize("randomness", ["error", "different"])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("make", CASES)
def test_effects_are_those_of_the_loop(make: Callable[[], Case], calls: int, randomness: str) -> None:
    x = torch.arange(2.0 * T).reshape(T, 2)
    torch.manual_seed(0)
    plain = make()
    expected = [torch.stack([plain.fn(row) for row in x]) for _ in range(calls)]
    torch.manual_seed(0)
    case = make()
    mapped = mtml.task_map(case.fn, randomness=randomness)
    for each in expected:
        assert torch.allclose(mapped(x), each)
    assert case.ran() == plain.ran()


class Counting:
    """An argument that counts by itself, in a method, and what it calls."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, set[int]()

    def __call__(self) -> None:
        self.calls += 1

    def note(self) -> None:
        self.seen.add(len(self.seen))


def by_call(x: Tensor, given: Any) -> Tensor:
    given()
    return x.sum()


def by_method(x: Tensor, given: Any) -> Tensor:
    given.note()
    return x.sum()


def by_attribute(x: Tensor, given: Any) -> Tensor:
    given.calls += 1
    return x.sum()


def by_iteration(x: Tensor, given: Any) -> Tensor:
    for _ in given.numbers:
        break
    return x.sum()


@pytest.mark.parametrize("fn", [by_call, by_method, by_attribute, by_iteration])
def test_effects_of_objects_among_the_arguments(fn: Callable[..., Tensor]) -> None:
    def made() -> Counting:
        given: Any = Counting()
        given.numbers = iter(range(1000))
        return given

    x, plain, mapped = torch.randn(T, 2), made(), made()
    task = mtml.task_map(fn, (0, None))
    for _ in range(2):
        expected = torch.stack([fn(row, plain) for row in x])
        assert torch.allclose(task(x, mapped), expected)
    assert vars(mapped).keys() == vars(plain).keys()
    assert (mapped.calls, mapped.seen, next(mapped.numbers)) == (plain.calls, plain.seen, next(plain.numbers))  # type: ignore[attr-defined]


def test_objects_that_only_hold_numbers_are_no_effect() -> None:
    class Settings:
        scale = 2.0

    x = torch.randn(64, 2)
    task = mtml.task_map(lambda row, given: (row * given.scale).sum(), (0, None))
    assert torch.allclose(task(x, Settings()), 2 * x.sum(1), atol=1e-5)
    assert "runs for every task" not in task.explain(x, Settings()).reason


def test_a_tensor_with_nan_that_nothing_writes_to_is_no_effect() -> None:
    table = torch.full((2,), float("nan"))
    mapped = mtml.task_map(lambda x: x.sum() + table.nan_to_num().sum())
    x = torch.randn(64, 2)
    assert torch.allclose(mapped(x), x.sum(1))
    assert "runs for every task" not in mapped.explain(x).reason


def test_gradients_that_are_there_and_nothing_adds_to_are_no_effect() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    mapped = mtml.task_map(lambda x: model(x).sum())
    x = torch.randn(64, 2)
    assert torch.allclose(mapped(x), model(x).sum(1), atol=1e-6)
    assert "runs for every task" not in mapped.explain(x).reason
