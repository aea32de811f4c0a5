"""The fast lane of backend `cuda`: the bits of the long way, in memory that is safe, and the long way where it ends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases.call_random import random_call, weighed
from cases.cuda_engine import CUDA_HOST, HostEngine, registered
from cases.cuda_mlp import HostKernels, with_kernels
from cases.eager_call import eager
from cases.engine import Evaluated, same_bits
from cases.network_calls import NETWORKS, network_call
from torch import Tensor, nn

from mtml_kernels.cuda.inner_loop import device as device_module
from mtml_kernels.cuda.inner_loop.device import DeviceEngine
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.functional import inner_loop
from mtml_kernels.functional.inner_loop import InnerLoopResult
from mtml_kernels.native import engine as native_engine
from mtml_kernels.native.tensors import read_call
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import Program, trace
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, STARTS, InnerLoopArgs

every_network = pytest.mark.parametrize("name", NETWORKS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
Cotangents = Sequence[Tensor | None]


@dataclasses.dataclass
class Counted(HostEngine):
    """Knows how often native code was called."""

    calls: int = 0

    def calling(self, native: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        inside = super().calling(native, device)

        def call(*arguments: Any) -> Any:
            found = inside(*arguments)
            self.calls += found is not None
            return found

        return call


@pytest.fixture
def engine() -> Iterator[Counted]:
    counted = Counted()
    with registered(counted):
        yield counted


@pytest.fixture
def only_lane(engine: Counted) -> Counted:
    """The long way fails."""

    def refuse(*arguments: object) -> None:
        pytest.fail("the long way")

    BACKENDS.register(dataclasses.replace(BACKENDS.named(CUDA_HOST), forward=refuse, backward=refuse))
    return engine


# --- calls of all kinds, through the door of eager code ---------------------------------------------------------------


def long_way(a: InnerLoopArgs, cotangents: Cotangents) -> Evaluated:
    with registered(lane=False):
        return eager(a, cotangents, CUDA_HOST)


@every_dtype
@every_network
def test_the_lane_has_the_bits_of_the_long_way(name: str, dtype: torch.dtype) -> None:
    a = network_call(name, 3, dtype)
    for alone in (True, False):
        with registered() as backend:
            cotangents = weighed(a, backend, alone)
            found = [eager(a, cotangents, CUDA_HOST) for _ in range(2)]
        expected = long_way(a, cotangents)
        assert all(same_bits(each, expected) for each in found)


@every_dtype
@every_network
def test_gradients_of_parameters_and_rates_come_by_the_lane(name: str, dtype: torch.dtype) -> None:
    a = network_call(name, 3, dtype)
    a = a._replace(needs=NEED_PARAMS | NEED_LR)
    counted = Counted()
    with registered(counted) as backend:
        cotangents = weighed(a, backend, alone=True)
        found = eager(a, cotangents, CUDA_HOST)
    assert counted.calls == (1 if a.spec.has(STARTS) else 2)  # own starts have gradients of their own
    assert same_bits(found, long_way(a, cotangents))


def test_random_calls_have_the_bits_of_the_long_way() -> None:
    taken = 0
    for seed in range(20):
        a = random_call(seed, seed % 8)
        counted = Counted()
        with registered(counted) as backend:
            cotangents = weighed(a, backend, alone=seed % 2 == 0)
            found = eager(a, cotangents, CUDA_HOST)
        taken += counted.calls > 0
        assert same_bits(found, long_way(a, cotangents)), seed
    assert taken > 12  # others have to be converted, or are empty


# --- a perceptron -----------------------------------------------------------------------------------------------------


class Task:
    """Batches for a perceptron, of float64 unless told otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64, outputs: int = 2, tasks: int = 3) -> None:
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)
        self.program: Program = trace(self.net, [(3,)])
        self.params = dict(self.net.named_parameters())
        self.sx, self.qx = (torch.randn(tasks, n, 3, dtype=dtype) for n in (4, 5))
        self.sy, self.qy = (torch.randn(tasks, n, outputs, dtype=dtype) for n in (4, 5))

    def __call__(self, lr: Any = 0.1, **options: Any) -> InnerLoopResult:
        told = {"steps": 2, "loss": "mse", "query_x": self.qx, "query_y": self.qy, "backend": CUDA_HOST} | options
        params, x, y = (told.pop(name, getattr(self, name)) for name in ("params", "sx", "sy"))
        return inner_loop(told.pop("program", self.program), params, x, y, lr, **told)

    def gradients(self, result: InnerLoopResult, seed: Tensor | None = None) -> list[Tensor]:
        seed = torch.ones_like(result.loss) if seed is None else seed
        return list(torch.autograd.grad(result.loss, list(self.params.values()), seed, retain_graph=True))


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
    task = Task()
    seed = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    for _ in range(2):
        found = task.gradients(task(), seed)
        exact = task.gradients(task(backend="reference"), seed)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        first = task.gradients(task(first_order=True), seed)
        assert max(float((a - b).norm() / b.norm()) for a, b in zip(first, exact, strict=True)) > 1e-3


def test_one_number_for_all_tasks_is_a_cotangent(only_lane: Counted) -> None:
    task = Task()
    for reduce, share in ((torch.sum, 1.0), (torch.mean, 1 / 3)):
        task.net.zero_grad()
        reduce(task().loss).backward()
        expected = task.gradients(task(), torch.full((3,), share, dtype=torch.float64))
        assert all(torch.equal(p.grad, g) for p, g in zip(task.net.parameters(), expected, strict=True))
        reduce(task().loss).backward()
        assert all(torch.equal(p.grad, 2 * g) for p, g in zip(task.net.parameters(), expected, strict=True))


def test_cotangents_of_other_outputs_take_the_long_way_back(engine: Counted) -> None:
    task = Task()
    names = list(task.params)
    for _ in range(2):
        ours, theirs = task(), task(backend="reference")
        sums = [r.loss.sum() + r.support_losses.sin().sum() + r.params[names[0]].sum() for r in (ours, theirs)]
        found, expected = (torch.autograd.grad(s, list(task.params.values())) for s in sums)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_inputs_take_the_long_way_back(engine: Counted) -> None:
    task = Task()
    x = task.sx.clone().requires_grad_()
    for _ in range(2):
        losses = [task(sx=x, backend=backend).loss.sum() for backend in (CUDA_HOST, "reference")]
        found, expected = (torch.autograd.grad(loss, [x, *task.params.values()]) for loss in losses)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own_rates", [False, True])
def test_perceptrons_with_a_kernel_of_their_own_have_it_in_the_lane(own_rates: bool) -> None:
    """With a rate for every parameter and a frozen one, or one for all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    task = Task(torch.float32)
    task.net, task.program, task.params = net, trace(net, [(1,)]), dict(net.named_parameters())
    task.sx, task.sy, task.qx, task.qy = (torch.randn(3, n, 1) for n in (4, 4, 5, 5))
    net[2].bias.requires_grad_(not own_rates)
    rates = {name: torch.tensor(0.01 * i, requires_grad=True) for i, name in enumerate(task.params, 1)}
    lr, wanted = (rates, [*rates.values()]) if own_rates else (0.01, [])
    wanted += [p for p in task.params.values() if p.requires_grad]
    seed, results = torch.tensor([0.5, -2.0, 1.0]), []
    for lane in (True, False, True):
        with with_kernels(lane=lane) as kernels:
            for _ in range(2):
                found = task(lr=lr, keep="none")
                results.append((results_of(found), list(torch.autograd.grad(found.loss, wanted, seed))))
            chosen = BACKENDS.named(CUDA_HOST)
            lanes = [] if chosen.fast_lane is None else [entry for _, entry in chosen.fast_lane.calls.values()]
        assert kernels.launches == 2
        assert all(entry is not None and entry.call.backward is not None for entry in lanes) and bool(lanes) is lane
    assert all(same_bits(results[0], other) for other in results[1:])
    exact = task(lr=lr, keep="none", backend="reference")
    torch.testing.assert_close(results[0][0], results_of(exact), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], list(torch.autograd.grad(exact.loss, wanted, seed)), rtol=1e-3, atol=1e-4)


def test_errors_of_a_perceptrons_kernel_are_said() -> None:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    task = Task(torch.float32)
    task.net, task.program, task.params = net, trace(net, [(1,)]), dict(net.named_parameters())
    task.sx, task.sy, task.qx, task.qy = (torch.randn(3, n, 1) for n in (4, 4, 5, 5))
    with with_kernels(HostKernels(threads=33)), pytest.raises(RuntimeError, match="threads"):
        task(keep="none")


# --- memory -----------------------------------------------------------------------------------------------------------


def results_of(result: InnerLoopResult) -> list[Tensor]:
    return [result.loss, result.output, result.support_losses, *result.params.values()]


@pytest.mark.parametrize("tasks", [3, 400])
def test_results_are_tensors_of_their_own(tasks: int, only_lane: Counted) -> None:
    """Whether they lie in one piece of memory or, many tasks, each by itself: what is done to one leaves the others."""
    task = Task(tasks=tasks)
    results = results_of(task(keep="steps"))
    for made in (results, task.gradients(task())):
        plain = [t.detach() for t in made]
        assert not any(t._is_view() for t in made)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in plain)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(t.untyped_storage().nbytes() >= t.nbytes and t.data_ptr() % 64 == 0 for t in plain)
        copies = [t.clone() for t in plain]
        for i, t in enumerate(plain):
            t.fill_(7)
            assert all(torch.equal(t, c) for t, c in zip(plain[i + 1 :], copies[i + 1 :], strict=True))


def test_a_result_outlives_the_others(only_lane: Counted) -> None:
    task = Task()
    with torch.no_grad():
        kept = [task(lr=lr).loss for lr in (0.1, 0.2, 0.3)]
        again = [task(lr=lr).loss.clone() for lr in (0.1, 0.2, 0.3)]
    assert same_bits((kept, []), (again, []))
    grads = [task.gradients(task())[i] for i in range(4)]
    assert same_bits((grads, []), (task.gradients(task()), []))


def test_the_losses_of_all_steps_do_not_keep_what_is_large(only_lane: Counted) -> None:
    """A loss shares memory with results of a few kilobytes at most."""
    small, large = (Task(tasks=tasks) for tasks in (3, 400))
    for task, shared in ((small, True), (large, False)):
        with torch.no_grad():
            result = task(keep="steps")
        ends = [t.data_ptr() for t in results_of(result)]
        assert (max(ends) - min(ends) < 16 * 1024) is shared


def test_calls_side_by_side_have_gradients_of_their_own(only_lane: Counted) -> None:
    task = Task()
    first, second = task(lr=0.1), task(lr=0.5)
    found = [task.gradients(r) for r in (second, first, second, first)]  # the graph is retained
    assert same_bits((found[0], found[1]), (found[2], found[3]))
    assert not torch.equal(found[0][0], found[1][0])


def test_what_was_changed_since_is_noticed(only_lane: Counted) -> None:
    task = Task()
    result = task()
    with torch.no_grad():
        task.net[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        task.gradients(result)


def test_a_second_derivative_raises(engine: Counted) -> None:
    task = Task()
    for _ in range(2):
        (grad, *_) = torch.autograd.grad(task().loss.sum(), list(task.params.values()), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


# --- what comes next may be another call ------------------------------------------------------------------------------


def same_as_reference(task: Task, **options: Any) -> None:
    ours, theirs = task(**options), task(**options | {"backend": "reference"})
    torch.testing.assert_close(results_of(ours), results_of(theirs), rtol=1e-9, atol=1e-12)
    if ours.loss.requires_grad:
        wanted = [p for p in task.params.values() if p.requires_grad]
        unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        found, expected = (torch.autograd.grad(r.loss.sum(), wanted, **unused) for r in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_call_is_what_it_says(engine: Counted) -> None:
    task, other = Task(), Task()
    mask = torch.rand(3, 4).double()
    some = list(task.params)[:2]
    starts = {some[0]: torch.randn(3, 8, 3).double()}
    calls: list[dict[str, Any]] = [
        {}, {"lr": 0.2}, {"lr": 1}, {"steps": 3}, {"loss": "huber"}, {"query_loss": "l1"}, {"first_order": True},
        {"mask": mask}, {"mask": mask.float()}, {"adapted": some}, {"adapted": some[:1]}, {"keep": "none"},
        {"lr": torch.tensor(0.3)}, {"lr": dict.fromkeys(task.params, 0.1)}, {"step_weights": [0.1, 0.2, 0.3]},
        {"query_y": None}, {"query_x": None, "query_y": None}, {"loss": nn.MSELoss(reduction="sum")},
        {"params": list(task.params.values())}, {"sx": [task.sx]}, {"start": starts}, {"program": other.program},
    ]  # fmt: skip
    for _ in range(2):
        for options in calls:
            same_as_reference(task, **options)


def test_other_tensors_are_other_calls(engine: Counted) -> None:
    task = Task()
    same_as_reference(task)
    for name in ("sx", "sy", "qx", "qy"):
        before = getattr(task, name)
        for change in (lambda t: t + 1, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: torch._neg_view(-t)):
            setattr(task, name, change(before))
            same_as_reference(task)
        setattr(task, name, before)
    task.sx, task.sy = torch.cat([task.sx, task.sx], 1), torch.cat([task.sy, task.sy], 1)
    same_as_reference(task)
    task.net[0].bias.requires_grad_(False)
    same_as_reference(task)
    with torch.no_grad():
        same_as_reference(task)
    with torch.inference_mode():
        same_as_reference(task)
    same_as_reference(task)


def test_a_loss_whose_attributes_change_is_followed(engine: Counted) -> None:
    task, loss = Task(), nn.MSELoss()
    for reduction in ("mean", "sum", "mean"):
        loss.reduction = reduction
        torch.testing.assert_close(task(loss=loss).loss, task(loss=nn.MSELoss(reduction=reduction)).loss)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a shape": (ValueError, "y: expected", {"sy": torch.ones(3, 4, 5).double()}),
    "a dtype": (TypeError, "x: expected float64", {"sx": torch.ones(3, 4, 3)}),
    "no tensor": (TypeError, "query_y", {"query_y": 1.0}),
    "a name": (ValueError, "params: expected every parameter", {"params": {}}),
    "an option": (ValueError, "keep: expected one of", {"keep": "all"}),
    "True for 2 steps": (TypeError, "steps: expected an int", {"steps": True}),
    "True for a rate": (TypeError, "lr: expected a number", {"lr": True}),
    "no number": (ValueError, "lr: expected finite rates", {"lr": float("nan")}),
    "a backend": (ValueError, "unknown backend", {"backend": "gpu"}),
}


@pytest.mark.parametrize("name", BAD)
def test_checks_stand_also_before_what_has_passed(name: str, engine: Counted) -> None:
    task = Task()
    kind, words, options = BAD[name]
    for _ in range(2):
        for good in ({}, {"steps": 1}, {"lr": 1}):
            task(**good)
        with pytest.raises(kind, match=words):
            task(**options)


def test_class_ids_are_looked_at_in_every_call(engine: Counted) -> None:
    task = Task()
    labels = [torch.randint(2, (3, n)) for n in (4, 5)]
    for _ in range(2):
        for good in (labels, [-100 * torch.ones_like(y) for y in labels]):
            same_as_reference(task, sy=good[0], query_y=good[1], loss="cross_entropy")
        with pytest.raises(ValueError, match=r"query_y: expected class ids in \[0, 2\)"):
            task(sy=labels[0], query_y=labels[1] + 1, loss="cross_entropy")


def test_rates_of_other_dtypes_and_numbers_are_their_own(engine: Counted) -> None:
    for dtype in (torch.float64, torch.float32, torch.float64):
        task = Task(dtype)
        found, expected = task(lr=0.3), task(lr=0.3, backend="reference")
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.loss.dtype == dtype


def test_step_weights_that_require_grad_are_refused(engine: Counted) -> None:
    a = network_call("adam", 3)
    weights = torch.ones(a.spec.steps + 1, dtype=a.params[0].dtype, requires_grad=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="step_weights requires grad"):
            eager(a._replace(step_weights=weights, needs=1), [None] * 3, CUDA_HOST)


# --- the reader -------------------------------------------------------------------------------------------------------


def test_forms_tell_all_that_is_looked_at() -> None:
    t = torch.ones(2, 3)
    tensors = [t, t.double(), t[:1], t.reshape(3, 2), t[None], torch.ones(2, 3, dtype=torch.int64)]
    forms = [read_call([u]) for u in tensors]
    forms += [read_call(t), read_call([t, t]), read_call(t, t), read_call(None), read_call([]), read_call((t,), None)]
    forms += [read_call([t.clone().requires_grad_()])]
    assert None not in forms
    assert len({form for form, _ in filter(None, forms)}) == len(forms)
    assert read_call([t]) == read_call((t,))
    same = read_call([torch.zeros(2, 3)])
    assert same is not None and forms[0] is not None and same[0] == forms[0][0] and same[1] != forms[0][1]


def test_what_must_be_looked_at_more_closely_is_not_read() -> None:
    class Other(torch.Tensor):
        pass

    freed, cut = torch.ones(4), torch.ones(8)[4:]
    freed.untyped_storage().resize_(0)
    cut.untyped_storage().resize_(20)
    tensors: list[Any] = [freed, cut, torch.ones(2, 2).t(), torch._neg_view(torch.ones(2)), torch.ones(0)]
    tensors += [torch.ones(2, device="meta"), torch.ones(2).as_subclass(Other), torch.ones(2).half(), 1.0, [1.0]]
    tensors += [torch.ones(2).to_sparse(), torch._efficientzerotensor((2,)), torch.ones(2, dtype=torch.bool)]
    read = [i for i, t in enumerate(tensors) if read_call(t) is not None]
    assert read == []


def test_a_parameter_that_is_cut_between_two_calls_is_noticed(engine: Counted) -> None:
    """Its storage is asked once for each place where it lies."""
    task = Task()
    for _ in range(2):
        task()
    task.net[0].weight.untyped_storage().resize_(8)
    with pytest.raises(TypeError, match="memory of its own"):
        task()


# --- the engine -------------------------------------------------------------------------------------------------------


def test_errors_of_a_launch_are_said() -> None:
    task = Task()
    with registered(HostEngine(threads=33)), pytest.raises(RuntimeError, match="expected 32 to 256 threads"):
        task()


def test_what_nobody_writes_is_nan() -> None:
    """Memory that native code asks for is poisoned too: outputs, carry and gradients."""

    class Nothing(HostEngine):
        def functions(self) -> tuple[int, int]:
            found: tuple[int, int] = native_engine().no_launches()
            return found

    task = Task()
    with registered(Nothing()):
        for keep in ("none", "steps"):
            result = task(keep=keep)
            assert all(t.isnan().all() for t in (*results_of(result), *task.gradients(result)))


def test_calls_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two GPUs that need not be there."""
    now = [0]

    class On(nullcontext[None]):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def __enter__(self) -> None:
            now.append(self.index)

        def __exit__(self, *error: object) -> None:
            now.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    engine = DeviceEngine(current=lambda: now[-1])
    for index in (0, 1, 0):
        call = engine.calling(lambda *arguments: (now[-1], *arguments), torch.device("cuda", index))
        assert call("a", "b") == (index, "a", "b")
        assert now == [0]


def test_no_code_for_the_gpu_names_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDeviceCode(RuntimeError):
        pass

    def refuse(*arguments: object) -> None:
        raise NoDeviceCode("no kernel image")

    h200 = SimpleNamespace(name="NVIDIA H200", capability=(9, 0))
    monkeypatch.setattr(device_module, "engine", lambda: SimpleNamespace(NoDeviceCode=NoDeviceCode))
    monkeypatch.setattr(device_module, "devices", lambda: [h200])
    monkeypatch.setattr(device_module, "built_codes", lambda: ("sm_80",))
    call = DeviceEngine(current=lambda: 0).calling(refuse, torch.device("cuda", 0))
    with pytest.raises(BackendUnavailable, match=r"NVIDIA H200.* has code for sm_80"):
        call()
