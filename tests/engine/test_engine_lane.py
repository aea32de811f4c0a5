"""The fast lane of the compiled CPU engine: the bits of the long way, in memory that is safe, and the long way where it
ends.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases.call_random import random_call, weighed
from cases.cuda_engine import poisoned_memory
from cases.eager_call import Cotangents, eager
from cases.engine import Evaluated, same_bits
from cases.network_calls import NETWORKS, network_call
from torch import Tensor, nn

from mtml_kernels.functional import inner_loop
from mtml_kernels.functional.inner_loop import InnerLoopResult
from mtml_kernels.native import engine, inner_loop_lane
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.ops.inner_loop_backends import FORMS
from mtml_kernels.program import Program, trace
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, PLAIN, InnerLoopArgs
from mtml_kernels.schema.inner_loop_lane import FastLane, LaneCall


@contextmanager
def replaced(name: str = "cpu", **parts: Any) -> Iterator[None]:
    """A backend with other parts, inside."""
    before = BACKENDS.named(name)
    BACKENDS.register(dataclasses.replace(before, **parts))
    try:
        yield
    finally:
        BACKENDS.register(before)


class Counted:
    """The lane of a backend, which knows how often its native code gave results."""

    def __init__(self, name: str = "cpu") -> None:
        self.calls = 0
        self._lane = BACKENDS.named(name).fast_lane
        self.lane = FastLane(self._lane.read, self._make)

    def _make(self, a: InnerLoopArgs) -> LaneCall | None:
        found = self._lane.make(a)
        if found is None:
            return None
        return LaneCall(self._counting(found.forward), found.backward and self._counting(found.backward))

    def _counting(self, native: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = native(*arguments)
            self.calls += found is not None
            return found

        return call


@pytest.fixture
def counted() -> Iterator[Counted]:
    found = Counted()
    with replaced(fast_lane=found.lane), poisoned_memory():
        yield found


@pytest.fixture
def only_lane() -> Iterator[Counted]:
    """The long way fails."""

    def refuse(*arguments: object) -> None:
        pytest.fail("the long way")

    found = Counted()
    with replaced(fast_lane=found.lane, forward=refuse, backward=refuse), poisoned_memory():
        yield found


def long_way(a: InnerLoopArgs, cotangents: Cotangents, name: str = "cpu") -> Evaluated:
    with replaced(name, fast_lane=None):
        return eager(a, cotangents, name)


# --- the bits of the long way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_lane_has_the_bits_of_the_long_way(name: str, dtype: torch.dtype) -> None:
    a = network_call(name, 3, dtype)
    for alone in (True, False):
        cotangents = weighed(a, "cpu", alone)
        with poisoned_memory():
            found = [eager(a, cotangents, "cpu") for _ in range(2)]
        assert all(same_bits(each, long_way(a, cotangents)) for each in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_parameters_and_rates_come_by_the_lane(name: str, counted: Counted) -> None:
    a = network_call(name, 3)._replace(needs=NEED_PARAMS | NEED_LR)
    cotangents = weighed(a, "cpu", alone=True)
    found = eager(a, cotangents, "cpu")
    assert counted.calls == (1 if "steps" in name or not has_losses_of_the_end(a) else 2)
    assert same_bits(found, long_way(a, cotangents))


def has_losses_of_the_end(a: InnerLoopArgs) -> bool:
    """Losses of all steps have cotangents of their own, for which the engine runs again."""
    loss, *_ = BACKENDS.named("cpu").forward(a._replace(needs=0))
    return loss.ndim == 1


def test_random_calls_have_the_bits_of_the_long_way() -> None:
    taken = 0
    for seed in range(24):
        a, counted = random_call(seed, seed % 8), Counted()
        cotangents = weighed(a, "cpu", alone=seed % 2 == 0)
        with replaced(fast_lane=counted.lane), poisoned_memory():
            found = eager(a, cotangents, "cpu")
        taken += counted.calls > 0
        assert same_bits(found, long_way(a, cotangents)), seed
    assert taken > 10  # others have gradients a task, must be converted, or are empty


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_has_its_own_plans(form: str) -> None:
    task, lanes = Task(2, torch.float32), []
    for lane in (True, False, True):
        counted = Counted(form)
        with replaced(form, fast_lane=counted.lane if lane else None), poisoned_memory():
            result = task(keep="none", backend=form)
            lanes.append((results_of(result), task.gradients(result)))
        assert counted.calls == (2 if lane else 0)
    assert all(same_bits(lanes[0], each) for each in lanes)


# --- a perceptron -----------------------------------------------------------------------------------------------------


class Task:
    """Batches for a perceptron."""

    def __init__(self, tasks: int = 3, dtype: torch.dtype = torch.float64) -> None:
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.program: Program = trace(self.net, [(3,)])
        self.params = dict(self.net.named_parameters())
        self.sx, self.qx = (torch.randn(tasks, n, 3, dtype=dtype) for n in (4, 5))
        self.sy, self.qy = (torch.randn(tasks, n, 2, dtype=dtype) for n in (4, 5))

    def __call__(self, lr: Any = 0.1, **options: Any) -> InnerLoopResult:
        told = {"steps": 2, "loss": "mse", "query_x": self.qx, "query_y": self.qy, "backend": "cpu"} | options
        x, y = (told.pop(name, getattr(self, name)) for name in ("sx", "sy"))
        return inner_loop(self.program, self.params, x, y, lr, **told)

    def gradients(self, result: InnerLoopResult, seed: Tensor | None = None) -> list[Tensor]:
        seed = torch.ones_like(result.loss) if seed is None else seed
        return list(torch.autograd.grad(result.loss, list(self.params.values()), seed, retain_graph=True))


def results_of(result: InnerLoopResult) -> list[Tensor]:
    return [result.loss, result.output, result.support_losses, *result.params.values()]


@pytest.mark.parametrize("keep", ["none", "last", "steps"])
def test_a_meta_step_is_one_native_call_there_and_one_back(keep: str, only_lane: Counted) -> None:
    task = Task()
    for _ in range(3):
        before = only_lane.calls
        result = task(keep=keep)
        assert only_lane.calls == before + 1
        task.gradients(result)
        assert only_lane.calls == before + 2


def test_the_meta_gradient_is_of_second_order(only_lane: Counted) -> None:
    task, seed = Task(), torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    for _ in range(2):
        found = task.gradients(task(), seed)
        exact = task.gradients(task(backend="reference"), seed)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        first = task.gradients(task(first_order=True), seed)
        assert max(float((a - b).norm() / b.norm()) for a, b in zip(first, exact, strict=True)) > 1e-3


def test_one_number_for_all_tasks_is_read_where_it_stands(only_lane: Counted) -> None:
    """The cotangent of a sum or a mean has a stride of 0."""
    task = Task()
    for reduce, share in ((torch.sum, 1.0), (torch.mean, 1 / 3)):
        task.net.zero_grad()
        reduce(task().loss).backward()
        expected = task.gradients(task(), torch.full((3,), share, dtype=torch.float64))
        assert all(torch.equal(p.grad, g) for p, g in zip(task.net.parameters(), expected, strict=True))


def test_scales_that_a_summed_carry_does_not_know_take_the_long_way_back(counted: Counted) -> None:
    """Many parameters and tasks: the tasks' sum alone is carried, of which one scale can be had."""
    net = nn.Sequential(nn.Linear(3, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2))
    task = Task(9, torch.float32)
    task.net, task.program, task.params = net, trace(net, [(3,)]), dict(net.named_parameters())
    seeds = [torch.ones(9), torch.linspace(-1, 1, 9)]
    for seed, native in zip(seeds, (2, 1), strict=True):
        before = counted.calls
        found = task.gradients(task(), seed)
        assert counted.calls == before + native
        with replaced(fast_lane=None):
            assert same_bits((found, []), (task.gradients(task(), seed), []))


def test_gradients_of_the_data_take_the_long_way_back(counted: Counted) -> None:
    task, found = Task(), []
    x = task.sx.clone().requires_grad_()
    for lane in (True, False, True):
        with replaced(fast_lane=counted.lane if lane else None):
            loss = task(sx=x).loss.sum()
            found.append(list(torch.autograd.grad(loss, [x, *task.params.values()])))
    assert counted.calls == 2
    assert all(same_bits((found[0], []), (each, [])) for each in found)


def test_what_requires_no_grad_gets_none(only_lane: Counted) -> None:
    task = Task()
    task.net[0].weight.requires_grad_(False)
    task().loss.sum().backward()
    found = [p.grad for p in task.params.values()]
    assert found[0] is None and all(g is not None for g in found[1:])
    with torch.no_grad():
        assert not task().loss.requires_grad


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_are_asked_for_at_every_call(threads: int, only_lane: Counted) -> None:
    task, before = Task(7), torch.get_num_threads()
    expected = task.gradients(task())
    try:
        torch.set_num_threads(threads)
        assert same_bits((task.gradients(task()), []), (expected, []))
    finally:
        torch.set_num_threads(before)


# --- another form is another call -------------------------------------------------------------------------------------


def test_other_tensors_are_other_calls(counted: Counted) -> None:
    task = Task()
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t + 1, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: torch._neg_view(-t),
        lambda t: t[:2], lambda t: torch.cat([t, t], 1), lambda t: t.clone().requires_grad_(),
    ]  # fmt: skip
    task()
    for change in changes:
        data = {name: change(t) for name, t in (("sx", task.sx), ("sy", task.sy))}
        data |= {"query_x": change(task.qx), "query_y": change(task.qy)}
        for _ in range(2):
            found = task(**data)
            with replaced(fast_lane=None):
                expected = task(**data)
            assert same_bits((results_of(found), []), (results_of(expected), []))
            assert same_bits((task.gradients(found), []), (task.gradients(expected), []))


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a shape": (ValueError, "y: expected", {"sy": torch.ones(3, 4, 5).double()}),
    "a dtype": (TypeError, "x: expected float64", {"sx": torch.ones(3, 4, 3)}),
    "no tensor": (TypeError, "query_y", {"query_y": 1.0}),
    "an option": (ValueError, "keep: expected one of", {"keep": "all"}),
    "True for 2 steps": (TypeError, "steps: expected an int", {"steps": True}),
    "no number": (ValueError, "lr: expected finite rates", {"lr": float("nan")}),
    "no low-rank form": (ValueError, "cpu:low_rank", {"backend": "cpu:low_rank", "keep": "last"}),
    "tasks": (ValueError, "query_x", {"query_x": torch.ones(2, 5, 3).double()}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_the_same_as_without_the_lane(name: str) -> None:
    task = Task()
    kind, words, options = BAD[name]
    with replaced(fast_lane=None), pytest.raises(kind, match=words) as without:
        task(**options)
    for _ in range(2):
        task()
        with pytest.raises(kind, match=words) as caught:
            task(**options)
        assert str(caught.value) == str(without.value)


def test_labels_are_looked_at_in_every_call() -> None:
    task = Task()
    labels = [torch.randint(2, (3, n)) for n in (4, 5)]
    wrong = labels[1].clone()
    wrong[2, 3] = 2
    for _ in range(2):
        task(sy=labels[0], query_y=labels[1], loss="cross_entropy")
        with pytest.raises(ValueError, match=r"query_y: .*got 2 at task 2, sample 3"):
            task(sy=labels[0], query_y=wrong, loss="cross_entropy")


def test_ids_are_looked_at_in_every_call() -> None:
    a = network_call("words", 3)
    ids = a.support_x[0].clone()
    ids[1, 2, 0] = 99
    for _ in range(2):
        eager(a, weighed(a, "cpu", True), "cpu")
        with pytest.raises(ValueError, match=r"support_x \(sx\): .*99.* at task 1, sample 2"):
            eager(a._replace(support_x=[ids]), [None] * 9, "cpu")


def test_step_weights_that_require_grad_are_refused() -> None:
    a = network_call("adam", 3)
    weights = torch.ones(a.spec.steps + 1, dtype=a.params[0].dtype, requires_grad=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="step_weights requires grad"):
            eager(a._replace(step_weights=weights, needs=1), [None] * 3, "cpu")


# --- the graph and its memory -----------------------------------------------------------------------------------------


def test_a_second_derivative_raises(counted: Counted) -> None:
    task = Task()
    for _ in range(2):
        (grad, *_) = torch.autograd.grad(task().loss.sum(), list(task.params.values()), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


def test_what_was_changed_since_is_noticed(only_lane: Counted) -> None:
    """Also data that get no gradient: the way back might read them again."""
    task = Task()
    for tensor in (task.net[0].weight, task.sx):
        result = task()
        with torch.no_grad():
            tensor.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            task.gradients(result)


def test_a_graph_that_is_gone_says_so(only_lane: Counted) -> None:
    loss = Task()().loss.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_batched_cotangents_say_what_they_said_without() -> None:
    task = Task()
    messages = []
    for lane in (True, False):
        with replaced(**({} if lane else {"fast_lane": None})), pytest.raises(RuntimeError) as caught:
            torch.autograd.grad(task().loss, list(task.params.values()), torch.eye(3).double(), is_grads_batched=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_saved_tensors_go_through_the_hooks_around(counted: Counted) -> None:
    """As activation checkpointing and `save_on_cpu` have them: what comes back lies elsewhere."""
    task = Task()
    expected = task.gradients(task())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        result = task()
    assert same_bits((task.gradients(result), []), (expected, []))


@pytest.mark.parametrize("tasks", [3, 400])
def test_results_are_tensors_of_their_own(tasks: int, only_lane: Counted) -> None:
    """Whether they lie in one piece of memory or, many tasks, each by itself: what is done to one leaves the others."""
    task = Task(tasks)
    for made in (results_of(task(keep="steps")), task.gradients(task())):
        plain = [t.detach() for t in made]
        assert not any(t._is_view() for t in made)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in plain)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(t.untyped_storage().nbytes() >= t.nbytes and t.data_ptr() % 64 == 0 for t in plain)
        copies = [t.clone() for t in plain]
        for i, t in enumerate(plain):
            t.fill_(7)
            assert all(torch.equal(t, c) for t, c in zip(plain[i + 1 :], copies[i + 1 :], strict=True))


def test_what_nobody_writes_is_nan(only_lane: Counted) -> None:
    """Memory that native code asks for is poisoned too: outputs, carry and gradients."""
    task = Task()
    engine().let_plans_rest(True)
    try:
        for keep in ("none", "steps"):
            result = task(keep=keep)
            assert all(t.isnan().all() for t in (*results_of(result), *task.gradients(result)))
    finally:
        engine().let_plans_rest(False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lists": [3, 1, 1, 1, 0, 0]}, "lists: expected as many tensors as the plan reads"),
        ({"outputs": [[3]]}, "outputs: expected loss, output, support losses"),
        ({"adapted": 1, "outputs": [[3]] * 4}, "outputs: expected loss, output, support losses"),
        ({"carry": [[3, 8]]}, "carry: expected the plan's rows and columns"),
        ({"data": [0]}, "carry: expected one shape"),
        ({"carry": "twice", "data": [6]}, "data: expected places below 6"),
    ],
)
def test_native_parts_refuse_what_does_not_fit_their_plan(changed: dict[str, Any], words: str) -> None:
    """Counts and places index memory."""
    given, a = {}, plain_call()

    class Module:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine(), name)

        def PlanForward(self, **parts: Any) -> Any:
            given.update(parts)
            return engine().PlanForward(**parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_loop_lane, "engine", Module)
        lane = inner_loop_lane.engine_lane(0).make(a)
    assert lane is not None and given
    if changed.get("carry") == "twice":
        changed = changed | {"carry": given["carry"] * 2}
    with pytest.raises(ValueError, match=words):
        engine().PlanForward(**given | changed)
    with pytest.raises(ValueError, match="addresses: expected those of a call of this form"):
        lane.forward(b"\0" * 8)


def plain_call() -> InnerLoopArgs:
    a = network_call("adam", 3)
    spec = dataclasses.replace(a.spec, update=list(PLAIN))
    return a._replace(spec=spec, needs=NEED_PARAMS, hyper=[], moments=[])
