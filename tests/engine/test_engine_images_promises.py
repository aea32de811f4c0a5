"""What the compiled engine promises on images beside accuracy; test_engine_promises has it for other programs."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.engine import Evaluated, check, cotangents_of, evaluate, mapped, outputs_of, same_bits, strided
from cases.images import Both, Shape, conv_block, headed, image_case, random_image_case
from cases.inner_loop import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_promises import of_task, ones_of, per_task, poisoned, script, some_tasks
from torch import Tensor, nn
from torch.func import functional_call

from mtml_kernels.losses import LossSpec

seeds = st.integers(0, 2**40)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def group_norm_net(width: int = 8) -> nn.Module:
    """Nothing mixes samples: tasks of many rows are cut into chunks and blocks."""
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU(), nn.MaxPool2d(2)]
    return headed((1, 16, 16), *layers, nn.Conv2d(width, width, 3, groups=2), nn.InstanceNorm2d(width, affine=True))


def conv_net4(width: int, size: int = 16) -> nn.Module:
    """Four blocks, as Conv-4 has them."""
    layers = [conv_block(1 if i == 0 else width, width, nn.ReLU(), nn.MaxPool2d(2), padding=1) for i in range(4)]
    return headed((1, size, size), *(layer for block in layers for layer in block), out=5)


def residual_net() -> nn.Module:
    inner = nn.Sequential(*conv_block(6, 6, nn.LeakyReLU(0.1), padding=1), *conv_block(6, 6, padding=1))
    block = Both(inner, nn.Sequential(*conv_block(6, 6, kernel=1)))
    return headed(
        (1, 12, 12), nn.Conv2d(1, 6, 3, padding=1), block, nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.LayerNorm(6)
    )


CROSS: dict[str, Any] = {"loss": LossSpec("cross_entropy"), "lr": "tensor", "keep": 1, "lr_scale": 0.05}
NETS: dict[str, tuple[nn.Module, Shape]] = {
    "batch norm": (conv_net4(7), (1, 16, 16)),
    "group norm": (group_norm_net(), (1, 16, 16)),
    "residual": (residual_net(), (1, 12, 12)),
    "summed carry": (headed((1, 5, 5), *conv_block(1, 44, nn.ReLU()), nn.Conv2d(44, 44, 3)), (1, 5, 5)),
}


def case_of(name: str, tasks: int, dtype: torch.dtype = torch.float64, **options: Any) -> Case:
    model, shape = NETS[name]
    return image_case(model, shape, tasks=tasks, dtype=dtype, **{"support": 5, "query": 3, **CROSS, **options})


# --- the same bits ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seeds)
def test_random_calls_repeat_bit_by_bit(seed: int) -> None:
    """Also after a call on NaN, and where threads share the tasks or a single task's nodes."""
    case, rng = random_image_case(seed), random.Random(seed)
    cotangents = cotangents_of(case, rng)
    first = evaluate(case, "cpu", cotangents)
    evaluate(poisoned(case), "cpu", cotangents)
    assert same_bits(evaluate(case, "cpu", cotangents), first)
    assert same_bits(evaluate(case, "cpu", cotangents, threads=rng.choice([2, 3, 4])), first)


def large_case(kind: str, tasks: int) -> Case:
    """One sample's image is several units of work, a layer's gradient is summed in parts."""
    norm = nn.BatchNorm2d(32) if kind == "batch" else nn.GroupNorm(4, 32)
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32) if kind == "batch" else nn.Tanh(), nn.MaxPool2d(2)]
    model = headed((1, 32, 32), *layers, nn.AvgPool2d(4))
    return image_case(model, (1, 32, 32), tasks=tasks, support=24, query=5, steps=1, dtype=torch.float32, keep=1)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_one_large_task_on_any_number_of_threads(kind: str) -> None:
    for tasks in (1, 2):
        case = large_case(kind, tasks)
        first = evaluate(case, "cpu", ones_of(case))
        evaluate(poisoned(case), "cpu", ones_of(case), threads=2)
        for threads in (1, 2, 3, 4):
            assert same_bits(evaluate(case, "cpu", ones_of(case), threads=threads), first), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_a_task_gives_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    """Alone, first, in the middle and last of up to 6 tasks, on one to three threads."""
    pool = case_of(name, 6, dtype)
    alone = [of_task(some_tasks(pool, [4]), 0, everything) for everything in (False, True)]
    for size, position in ((2, 0), (2, 1), (3, 1), (5, 4), (6, 0), (6, 3)):
        order = [0, 1, 2, 3, 5][: size - 1]
        order.insert(position, 4)
        for everything in (False, True):
            found = of_task(some_tasks(pool, order), position, everything, threads=1 + size % 3)
            assert same_bits(found, alone[everything]), (size, position)


def test_two_python_threads_at_once() -> None:
    cases = [case_of("batch norm", 3), case_of("group norm", 2)]
    alone = [evaluate(case, "cpu", ones_of(case)) for case in cases]
    found: list[list[Evaluated]] = [[], []]

    def work(which: int) -> None:
        found[which] += [evaluate(cases[which], "cpu", ones_of(cases[which]), threads=2) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone, strict=True):
        assert len(results) == 3 and all(same_bits(r, expected) for r in results)


@settings(max_examples=40)
@given(seeds)
def test_random_calls_on_strided_memory(seed: int) -> None:
    case = random_image_case(seed)
    cotangents = [c if c is None else strided(c) for c in cotangents_of(case, random.Random(seed))]
    check(mapped(case, strided), cotangents)


# --- NaN and infinities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["support_x", "query_x"])
@pytest.mark.parametrize("name", NETS)
def test_nan_stays_in_its_task(name: str, group: str) -> None:
    case = case_of(name, 4)
    clean = evaluate(case, "cpu", ones_of(case))
    getattr(case, group)[0][2, 1, 7] = float("nan")
    dirty = evaluate(case, "cpu", ones_of(case), threads=2)
    assert dirty[0][0].isnan().tolist() == [task == 2 for task in range(4)]
    for ours, theirs in zip(per_task(case, dirty, [0, 1, 3]), per_task(case, clean, [0, 1, 3]), strict=True):
        assert torch.equal(ours, theirs)


PASSING: dict[str, list[nn.Module]] = {
    "conv, relu": [nn.Conv2d(1, 3, 2), nn.ReLU()],
    "relu, pool": [nn.ReLU(), nn.MaxPool2d(2)],
    "pool, relu": [nn.MaxPool2d(2), nn.ReLU()],
    "overlapping pool": [nn.MaxPool2d(3, 1, 1)],
    "pool, leaky": [nn.MaxPool2d(2), nn.LeakyReLU(0.1)],
    "average": [nn.AvgPool2d(2)],
    "depthwise": [nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, groups=2)],
    "group norm, relu, pool": [nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.MaxPool2d(2)],
    "instance norm, pool": [nn.InstanceNorm2d(1), nn.MaxPool2d(2)],
    "layer norm": [nn.LayerNorm(5)],
    "batch norm, relu, pool": [nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", PASSING)
def test_special_values_pass_as_in_pytorch(name: str, value: str, dtype: torch.dtype) -> None:
    """Outputs of every sample, and gradients of the inputs."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), *PASSING[name], nn.Flatten()).double()
    adapt: dict[str, Any] = {"adapt": lambda name: False, "lr": "all"}
    case = image_case(model, (1, 5, 5), tasks=1, query=4, steps=0, targets=False, dtype=dtype, **adapt)
    case.query_x[0][0, 1, 7] = float(value)
    case.query_x[0][0, 2, 0] = float(value)
    ones = [None, torch.ones_like(outputs_of(case, "cpu")[1]), None]
    found, expected = (evaluate(case, backend, ones, ["query_x"]) for backend in ("cpu", "reference"))
    tolerance: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found[0][1], expected[0][1], equal_nan=True, **tolerance)
    torch.testing.assert_close(found[1][0], expected[1][0], equal_nan=True, **tolerance)


# --- processes --------------------------------------------------------------------------------------------------------


def in_a_forked_child() -> int:
    """After a parallel region here, a child runs the same call: exit status 0 where the bits agree."""
    case = case_of("batch norm", 2)
    expected = evaluate(case, "cpu", ones_of(case), threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(evaluate(case, "cpu", ones_of(case), threads=2), expected) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_does_not_hang() -> None:
    assert script("in_a_forked_child", module="test_engine_images_promises") == 0


# --- memory -----------------------------------------------------------------------------------------------------------

IMAGE = (3, 40, 40)


def mini_conv(width: int = 32) -> nn.Module:
    """Conv-4 on smaller images, with running statistics out of the way."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1), nn.BatchNorm2d(width, track_running_stats=False)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 5))


def peak_growth(which: str, steps: int) -> float:
    """MiB by which a meta-gradient of six tasks raises this process's peak; a small one comes before."""
    torch.set_num_threads(1)
    model = mini_conv()
    options: dict[str, Any] = {"support": 5, "query": 15, "loss": LossSpec("cross_entropy"), "dtype": torch.float32}
    run = _engine_gradient if which == "engine" else _plain_gradient
    run(image_case(model, IMAGE, tasks=1, steps=1, **{**options, "support": 2, "query": 2}), model)
    before = _peak()
    run(image_case(model, IMAGE, tasks=6, steps=steps, lr_scale=0.01, **options), model)
    return _peak() - before


def query_growth(query: int) -> float:
    """MiB by which one task with so many query images raises the peak; a small one comes before."""
    torch.set_num_threads(1)
    model = mini_conv()
    options: dict[str, Any] = {"support": 2, "steps": 1, "loss": LossSpec("cross_entropy"), "dtype": torch.float32}
    _engine_gradient(image_case(model, IMAGE, tasks=1, query=2, **options), model)
    before = _peak()
    _engine_gradient(image_case(model, IMAGE, tasks=1, query=query, **options), model)
    return _peak() - before


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _engine_gradient(case: Case, model: nn.Module) -> None:
    case = case.with_tensors([t.requires_grad_() if i < len(case.params) else t for i, t in enumerate(case.tensors())])
    case.call("cpu")[0].mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in case.params if p.grad is not None)


def _plain_gradient(case: Case, model: nn.Module) -> None:
    """The loop everybody writes: the tasks one after another, then one backward pass."""
    names = [name for name, _ in model.named_parameters()]
    leaves = [p.detach().requires_grad_() for p in model.parameters()]
    assert case.query_y is not None

    def loss(theta: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(zip(names, theta, strict=True)), (x.view(-1, *IMAGE),)), y)

    total = torch.zeros(())
    for sx, sy, qx, qy in zip(case.support_x[0], case.support_y, case.query_x[0], case.query_y, strict=True):
        theta = leaves
        for _ in range(case.spec.steps):
            grads = torch.autograd.grad(loss(theta, sx, sy), theta, create_graph=True)
            theta = [p - case.lr[0] * g for p, g in zip(theta, grads, strict=True)]
        total = total + loss(theta, qx, qy)
    torch.autograd.grad(total, leaves)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_meta_step_takes_a_quarter_of_the_unrolled_graph() -> None:
    """And steps cost no more than what one task keeps of each: its parameters twice and two planes a layer."""
    module = "test_engine_images_promises"
    theirs, few, many = (
        script("peak_growth", *args, module=module) for args in (("plain", 5), ("engine", 5), ("engine", 15))
    )
    print(f"peak growth: unrolled graph {theirs:.0f} MiB, engine {few:.0f} MiB at 5 steps, {many:.0f} MiB at 15")
    assert 0 < few <= theirs / 4
    assert many - few <= 10 * 4.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_first_outputs_of_a_query_set_are_not_stored() -> None:
    """They would be two fifths of its planes: 205 of 500 KB an image."""
    few, many = (script("query_growth", query, module="test_engine_images_promises") for query in (40, 240))
    image = (many - few) / 200
    print(f"{image * 1024:.0f} KiB a query image")
    assert 0 < image < 0.38
