"""The schedule as a whole: how many launches, what it keeps, and that it is the same list whatever the tensors are."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases.engine import LOSSES, check, cotangents_of, draft_case, evaluate, mlp, outputs_of, worst_error
from cases.engine_random import random_case
from cases.images import random_image_case
from cases.inner_loop import Case
from engine.test_engine_promises import script
from torch import Tensor, nn

import mtml
from mtml_kernels.losses import LossSpec
from mtml_kernels.program import trace
from mtml_kernels.schedule import build, memory
from mtml_kernels.schedule.build import Plan, plan_of
from mtml_kernels.schedule.kernels import KERNELS
from mtml_kernels.schema.inner_loop import NEED_PARAMS, InnerLoopArgs, InnerLoopSpec


class Workload(NamedTuple):
    """A network and the sizes of its meta-step."""

    net: Callable[[], nn.Module]
    sizes: tuple[int, int, int, int]  # T, S, Q, K
    x: tuple[int, ...]
    out: int
    classes: bool


def perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions(channels: int, width: int, classes: int, pool: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        stride = {"stride": 1 if pool else 2, "padding": 1}
        layers += [nn.Conv2d(channels, width, 3, **stride), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(800 if pool else 256, classes))


WORKLOADS = {
    "sinusoid": Workload(lambda: perceptron(1, 40, 40, 1), (25, 10, 10, 5), (1,), 1, False),
    "siren": Workload(lambda: perceptron(2, 64, 64, 64, 3), (8, 1024, 1024, 3), (2,), 3, False),
    "omniglot_mlp": Workload(lambda: perceptron(784, 256, 128, 64, 64, 5), (32, 5, 75, 1), (784,), 5, True),
    "omniglot_conv": Workload(lambda: convolutions(1, 64, 5, False), (32, 5, 75, 1), (1, 28, 28), 5, True),
    "mini_conv": Workload(lambda: convolutions(3, 32, 5, True), (4, 5, 75, 5), (3, 84, 84), 5, True),
}


def workload(name: str, device: str = "meta", steps: int | None = None) -> InnerLoopArgs:
    """A workload's call; on the device "meta", tensors without memory."""
    net, (tasks, support, query, usual), shape, out, classes = WORKLOADS[name]
    model = net().to(device)
    program, loss = trace(model, [shape]), LossSpec("cross_entropy" if classes else "mse")
    named, adapted = dict(model.named_parameters()), [True] * len(program.params)
    spec = InnerLoopSpec.of(program, adapted, [loss, loss], steps=usual if steps is None else steps)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.zeros(tasks, count, *shape, device=device)
        lead = (tasks, count)
        return x, torch.zeros(lead, dtype=torch.long, device=device) if classes else x.new_zeros(*lead, out)

    (sx, sy), (qx, qy) = samples(support), samples(query)
    params, lr = [named[p.name].detach() for p in program.params], [torch.full((1,), 0.1, device=device)]
    return InnerLoopArgs(params, lr, [sx], [qx], [], [], sy, qy, None, None, None, spec, NEED_PARAMS)


def calls(plan: Plan) -> int:
    """Launches of a meta-step."""
    return len(plan.there.calls) + len(plan.trip(plan.usually).back.calls)


@pytest.mark.parametrize(
    "name, most", {"sinusoid": 68, "siren": 58, "omniglot_mlp": 42, "omniglot_conv": 56, "mini_conv": 200}.items()
)
def test_launches_of_a_meta_step(name: str, most: int) -> None:
    assert calls(plan_of(workload(name))) <= most


def test_the_same_list_for_any_tensors() -> None:
    """Of the shapes alone: tensors without memory, and ones that require grad."""
    there, other = plan_of(workload("sinusoid")), Plan.of(workload("sinusoid", "cpu"))
    assert [c.name for c in there.there.calls] == [c.name for c in other.there.calls]
    assert there.trip(there.usually).back == other.trip(other.usually).back


def test_parts_are_of_the_table_and_nothing_is_read_before_it_is_written() -> None:
    for name in ("sinusoid", "omniglot_conv"):
        plan = plan_of(workload(name))
        trip = plan.trip(plan.usually)
        written = {i for i, plane in enumerate(trip.back.planes) if plane.source is not None}
        for schedule in (trip.there, trip.back):
            for part in (part for call in schedule.calls for part in call.parts):
                assert part.kernel in KERNELS
                assert written.issuperset(set(part.reads) - {-1}), part
                written.update(part.writes)


# --- equal to the reference -------------------------------------------------------------------------------------------


def test_random_programs_and_networks() -> None:
    """Some of the cases of the engine's own tests; all of them run over the schedule in the slow one below."""
    for seed in range(60):
        rng = random.Random(seed)
        case = random_case(rng, seed % 11)
        check(case, cotangents_of(case, rng), backend="torch")
    for seed in range(20):
        check(case := random_image_case(seed), cotangents_of(case, random.Random(seed)), backend="torch")


@pytest.mark.slow
def test_the_engines_tests_over_the_schedule() -> None:
    module = "schedule.test_schedule"
    script("run_engine_tests", seconds=1800, module=module, MTML_TEST_ENGINE="torch")


def run_engine_tests() -> None:
    """Ends the process where one fails."""
    folder = Path(__file__).parents[1] / "engine"
    files = [str(folder / name) for name in ("test_engine.py", "test_engine_images.py")]
    if code := pytest.main([*files, "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]):
        sys.exit(code)


def test_first_order_is_not_second_order() -> None:
    """The control: a way back that drops H V is noticed."""
    cases = [draft_case(mlp([3, 8, 2]), steps=3, lr_scale=0.3, first_order=flag) for flag in (False, True)]
    ones = [torch.ones_like(t) if i == 0 else None for i, t in enumerate(outputs_of(cases[0], "torch"))]
    exact, first = (evaluate(case, "torch", ones) for case in cases)
    assert worst_error(first, exact) > 1e-2


# --- memory -----------------------------------------------------------------------------------------------------------


def stepped(steps: int, **options: Any) -> Case:
    """A case of some steps of a loop that is not chaotic."""
    return draft_case(mlp([3, 8, 2]), steps=steps, lr_scale=0.05, loss=LOSSES[0], **options)


@pytest.mark.parametrize("steps", [2, 3, 7, 16])
@pytest.mark.parametrize("keep", [0, 2])
def test_steps_that_run_again_give_the_same_bits(steps: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = stepped(steps, keep=keep)
    cotangents: list[Tensor | None] = [torch.ones_like(t) for t in outputs_of(case, "torch")]
    whole = evaluate(case, "torch", cotangents)
    monkeypatch.setattr(memory, "BUDGET", 0)
    monkeypatch.setattr(build, "_plans", {})
    again = evaluate(case, "torch", cotangents)
    for ours, theirs in zip(whole, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_memory_grows_with_the_root_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BUDGET", 0)

    def peak(steps: int) -> int:
        plan = Plan.of(workload("sinusoid", steps=steps))
        return max(plan.there.peak_bytes, plan.there.kept_bytes + plan.trip(plan.usually).back.peak_bytes)

    assert peak(100) < 4 * peak(4)


def test_a_hundred_steps_take_little_more_than_ten() -> None:
    """omniglot_mlp's 32 tasks, of which one step's weights take 31 MB. The unrolled graph of 100 steps was measured to
    take 4.2 GB (`python -m bench memory omniglot_mlp --providers mtml:torch,loop`).
    """

    def peak(steps: int) -> float:
        plan = Plan.of(workload("omniglot_mlp", steps=steps))
        return max(plan.there.peak_bytes, plan.there.kept_bytes + plan.trip(plan.usually).back.peak_bytes) / 1e6

    assert peak(100) < 390 < 2.5 * peak(10)  # with all that autograd holds until the way back is over


def test_stretches() -> None:
    assert memory.stretches(5, memory.BUDGET, 1) == []
    assert memory.stretches(10, 10 * memory.BUDGET, memory.BUDGET) == [range(9, 10), range(6, 9), range(3, 6), range(3)]
    assert memory.stretches(1, 10 * memory.BUDGET, memory.BUDGET) == []
    assert memory.stretches(4, 2 * memory.BUDGET, 0) == [range(3, 4), range(2, 3), range(1, 2), range(1)]


# --- dtypes and devices -----------------------------------------------------------------------------------------------


def small_net(seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).to(dtype)


def meta_gradient(seed: int, stored: torch.dtype, dtype: torch.dtype, backend: str) -> Tensor:
    """Of a network and data that are rounded to `stored`, computed in `dtype`."""
    net = small_net(seed, stored).to(dtype)
    data = [torch.randn(4, n, k).to(stored).to(dtype) for n, k in ((6, 3), (6, 2), (6, 3), (6, 2))]
    loss = mtml.MAML(net, lr=0.05, steps=5, loss="mse", backend=backend).meta_loss(*data)
    assert loss.dtype == dtype
    loss.mean().backward()
    return torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_beside_those_of_autograd(dtype: torch.dtype) -> None:
    """Parameters and sums are float32 between planes of half precision: five steps lose less than in a plain loop."""
    errors = []
    for seed in range(9):
        exact = meta_gradient(seed, dtype, torch.float64, "reference")
        own = [meta_gradient(seed, dtype, dtype, backend) for backend in ("torch", "general")]
        errors.append([float((grad - exact).norm() / exact.norm()) for grad in own])
    ours, theirs = torch.tensor(errors).median(0).values
    print(f"{dtype}: torch {ours:.1e}, autograd {theirs:.1e}")
    assert ours <= (2 if dtype == torch.float32 else 1) * theirs


def test_other_devices() -> None:
    """A dry run: nothing is computed, but every part has the tensors that it needs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )
    net = net.to("meta")
    maml = mtml.MAML(net, lr=0.1, steps=3, loss="mse", batch_norm="batch", backend="torch")
    x, y = torch.empty(2, 5, 1, 8, 8, device="meta"), torch.empty(2, 5, 3, device="meta")
    loss = maml.meta_loss(x, y, x, y)
    loss.mean().backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in net.parameters())


def test_it_takes_over_where_the_compiled_engine_does_not_run() -> None:
    net = nn.Linear(3, 2, device="meta")
    x, y = torch.empty(2, 5, 3, device="meta"), torch.empty(2, 5, 2, device="meta")
    assert mtml.MAML(net, lr=0.1, loss="mse").explain(x, y, x, y).kernel == "torch"
