"""The persistent inner loop, run on the CPU: equal to the reference, and the same bits however its threads run."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.call_random import (
    check_call,
    in_dtype,
    random_call,
    random_cotangents,
    run_call,
    some_tasks,
    task_of,
    weighed,
)
from cases.cuda_engine import CUDA_HOST, HostEngine, registered
from cases.cuda_host import ORDERS
from cases.engine import (
    GROUPS,
    LOSSES,
    Draft,
    Evaluated,
    check,
    converted,
    cotangents_of,
    draft_case,
    evaluate,
    film,
    is_finite,
    mapped,
    mlp,
    problem,
    same_bits,
    worst_error,
)
from cases.engine_random import random_case
from cases.network_calls import NETWORKS, network_call
from engine.test_engine_promises import script
from torch import Tensor

from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import Act
from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schema.inner_loop import (
    NEED_HYPER,
    NEED_LR,
    NEED_PARAMS,
    NEED_QUERY_Y,
    NEED_SUPPORT_X,
    NEED_SUPPORT_Y,
    STARTS,
    TASKS_APART,
    InnerLoopArgs,
    InnerLoopSpec,
)

every_network = pytest.mark.parametrize("name", NETWORKS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
pytestmark = pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom")  # PyTorch's, of one value


@pytest.fixture
def cuda_host() -> Iterator[str]:
    with registered() as name:
        yield name


# --- equal to the reference -------------------------------------------------------------------------------------------


def test_random_programs(cuda_host: str) -> None:
    for seed in range(152):
        rng = random.Random(seed)
        case = random_case(rng, seed % 11)
        wanted = [group for group in GROUPS if rng.random() < 0.7]
        check(case, cotangents_of(case, rng, cuda_host), wanted or ["params"], backend=cuda_host)


def test_random_rules_axes_and_gradients(cuda_host: str) -> None:
    compared = 0
    for seed in range(152):
        a = random_call(seed, seed % 8)
        compared += check_call(a, cuda_host, random_cotangents(a, seed))
    assert compared > 130  # the others are not finite


def test_random_calls_in_float32(cuda_host: str) -> None:
    """Any mistake is far above rounding, that of PyTorch's formulas written out (`torch`) as well."""
    compared = 0
    for seed in range(30):
        a = random_call(seed, seed % 8)
        cotangents = [c if c is None else c.float() for c in random_cotangents(a, seed)]
        small = in_dtype(a, torch.float32)
        wide = [c if c is None else c.double() for c in cotangents]
        exact = run_call(in_dtype(small, torch.float64), "reference", wide)
        results = [run_call(small, backend, cotangents) for backend in (cuda_host, "reference", "torch")]
        if all(map(is_finite, (exact, *results[1:]))):
            error, *usual = (worst_error(found, exact) for found in results)
            assert error < 1e-4 + 100 * max(usual), seed
            compared += 1
    assert compared > 25


@every_network
def test_networks(name: str, cuda_host: str) -> None:
    for tasks in (1, 3):
        a = network_call(name, tasks)
        for seed in range(3):
            assert check_call(a, cuda_host, random_cotangents(a, seed))


def test_strided_memory_and_expanded_numbers(cuda_host: str) -> None:
    """Tensors with gaps, and rates that are one number for all elements."""
    for seed in range(20):
        case = random_case(rng := random.Random(seed), 5)
        cotangents = cotangents_of(case, rng, cuda_host)
        apart = mapped(case, lambda t: torch.stack([t, torch.full_like(t, 7)], -1)[..., 0])
        check(apart, cotangents, backend=cuda_host)
        case.lr = [t.reshape(-1)[0].expand(t.shape) for t in case.lr]
        check(case, cotangents, [g for g in GROUPS if g != "lr"], backend=cuda_host)


def test_tensors_that_do_not_lie_in_memory_as_they_are(cuda_host: str) -> None:
    """Values still to be negated, and zeros that nobody wrote yet."""
    case = draft_case(mlp([3, 5, 2], Act.TANH))
    cotangents = cotangents_of(case, random.Random(0), cuda_host)
    expected = evaluate(case, cuda_host, cotangents)
    assert same_bits(evaluate(mapped(case, lambda t: torch._neg_view(-t)), cuda_host, cotangents), expected)
    zero = torch._efficientzerotensor(case.support_y.shape, dtype=torch.float64)
    found, plain = (dataclasses.replace(case, support_y=y) for y in (zero, torch.zeros_like(case.support_y)))
    assert same_bits(evaluate(found, cuda_host, cotangents), evaluate(plain, cuda_host, cotangents))


LOOPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tanh": (mlp([5, 24, 24, 3], Act.TANH), {"support": 10, "query": 10, "steps": 3}),
    "cross entropy": (
        mlp([20, 33, 5], Act.RELU),
        {"support": 5, "query": 15, "steps": 2, "loss": LossSpec("cross_entropy"), "weight_scale": 1.4},
    ),
    "film": (film(3, 17, 3, latent=5), {"support": 10, "query": 10, "steps": 3, "loss": LOSSES[0]}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_float32_errors_are_at_most_twice_pytorchs(name: str, cuda_host: str) -> None:
    """The median over the seeds; all kinds of loops are in tests/engine/test_engine_numerics.py."""
    draft, options = LOOPS[name]
    ratios = []
    for seed in range(20):
        case = problem(random.Random(seed), draft, dtype=torch.float32, **options)
        ones = torch.ones(len(case.support_y))
        exact = evaluate(converted(case, torch.float64), "reference", [ones.double(), None, None])
        ours, theirs = (errors(evaluate(case, b, [ones, None, None]), exact) for b in (cuda_host, "reference"))
        ratios.append([a / b for a, b in zip(ours, theirs, strict=True)])
    for group in zip(*ratios, strict=True):
        assert statistics.median(group) <= 2


def errors(found: Evaluated, exact: Evaluated) -> list[float]:
    """Of all outputs together and of all gradients together, relative to their norm."""
    pairs = [[torch.cat([t.double().flatten() for t in group]) for group in results] for results in (found, exact)]
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*pairs, strict=True)]


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 10), (12, 5), (60,)])
def test_gradients_of_targets_in_shapes_of_their_own(shape: tuple[int, ...], cuda_host: str) -> None:
    """As many elements a sample as the output has, which is 12 rows of 5."""
    draft = Draft()
    draft.view(draft.linear(draft.input(1, 4), 60), 12)
    case = draft_case(draft, loss=LossSpec("huber", delta=0.6), support=5, query=3)
    a = InnerLoopArgs.of_schema(case.op_arguments(NEED_PARAMS | NEED_SUPPORT_Y | NEED_QUERY_Y))
    assert a.query_y is not None
    ys = [y.reshape(*y.shape[:2], *shape) for y in (a.support_y, a.query_y)]
    a = a._replace(support_y=ys[0], query_y=ys[1])
    for seed in range(3):
        assert check_call(a, cuda_host, random_cotangents(a, seed))


# --- the same bits ----------------------------------------------------------------------------------------------------


def bits(a: InnerLoopArgs, **options: Any) -> list[Evaluated]:
    """From cotangents on every output, and on the loss alone, by an engine of its own."""
    with registered(HostEngine(**options)) as name:
        return [run_call(a, name, weighed(a, name, alone)) for alone in (False, True)]


def assert_same_bits(found: list[Evaluated], expected: list[Evaluated]) -> None:
    assert all(same_bits(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@every_dtype
@every_network
def test_bits_do_not_depend_on_threads_blocks_or_orders(name: str, dtype: torch.dtype) -> None:
    a = network_call(name, 3, dtype)
    expected = bits(a)
    for threads, order, blocks in ((64, 1, 2), (128, 2, 2), (256, 3, 1), (64, 4, 3), (32, 1, 3)):
        found = bits(a, threads=threads, order=order, most_blocks=blocks)
        assert_same_bits(found, expected)


@every_dtype
@pytest.mark.parametrize("outputs", [1, 2, 3, 6])
def test_many_samples_of_few_outputs(outputs: int, dtype: torch.dtype) -> None:
    """Four lanes take four columns, of which most are not there: more threads have work than there are elements."""
    for samples in (33, 34, 67):
        case = draft_case(mlp([5, 8, outputs], Act.TANH), support=samples, query=samples, dtype=dtype)
        a = InnerLoopArgs.of_schema(case.op_arguments(NEED_PARAMS | NEED_SUPPORT_X))
        expected = bits(a)
        assert all(is_finite(results) for results in expected)
        for threads in (64, 128, 256):
            assert_same_bits(bits(a, threads=threads), expected)


@every_dtype
@every_network
def test_bits_do_not_depend_on_the_chip(name: str, dtype: torch.dtype) -> None:
    """From one that has no room, so that all planes lie in the workspace, to one that has."""
    a = network_call(name, 3, dtype)
    expected = bits(a)
    for chip in (0, 700, 5000):
        assert_same_bits(bits(a, chip=chip, threads=64), expected)


@every_dtype
def test_the_full_kernel_gives_the_bits_of_the_plain_one(dtype: torch.dtype) -> None:
    for kind in (Act.TANH, Act.SIN):
        case = draft_case(mlp([3, 17, 33, 5], kind), step_weights=True, keep=2, masks=("some", "some"), dtype=dtype)
        a = InnerLoopArgs.of_schema(case.op_arguments(NEED_PARAMS | NEED_LR | NEED_SUPPORT_X))
        assert not Persistent(HostEngine).program(a, plan_of(a).usually).words.full
        assert_same_bits(bits(a, full=True), bits(a))


def test_bits_of_random_calls_repeat() -> None:
    """Also after a call on NaN; with other threads, orders, blocks and places each time."""
    for seed in range(20):
        a, rng = random_call(seed, seed % 8), random.Random(seed)
        options = {"threads": rng.choice([32, 64, 128, 256]), "order": rng.choice(ORDERS)}
        others = {"chip": rng.choice([0, 500, 2000, 10000]), "most_blocks": rng.choice([1, 2, 3])}
        with registered() as name:
            cotangents = random_cotangents(a, seed)
            first = run_call(a, name, cotangents)
            run_call(of_nan(a), name, cotangents)
            assert same_bits(run_call(a, name, cotangents), first)
        with registered(HostEngine(**options, **others)) as name:
            assert same_bits(run_call(a, name, cotangents), first), seed


def of_nan(a: InnerLoopArgs) -> InnerLoopArgs:
    """The same call on NaN."""

    def change(x: Any) -> Any:
        if isinstance(x, list):
            return [change(t) for t in x]
        return torch.full_like(x, float("nan")) if isinstance(x, Tensor) and x.is_floating_point() else x

    return a._replace(**{name: change(x) for name, x in a._asdict().items() if name not in ("spec", "needs")})


# --- tasks ------------------------------------------------------------------------------------------------------------


def apart(a: InnerLoopArgs) -> InnerLoopArgs:
    """The same call for gradients that each task has for itself."""
    spec = InnerLoopSpec(*a.spec.values[:-1], a.spec.axes | TASKS_APART)
    return a._replace(spec=spec, needs=a.needs & ~(NEED_LR | NEED_HYPER))


@every_dtype
@every_network
def test_a_task_gives_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    a = apart(network_call(name, 25, dtype))
    large = bits(a, most_blocks=4)
    for task in (0, 11, 24):
        alone = bits(some_tasks(a, [task]), threads=64)
        of_three = bits(some_tasks(a, [3, task, 7]), most_blocks=1)
        for some, three, one in zip(large, of_three, alone, strict=True):
            assert same_bits(task_of(a, some, task), task_of(a, one, 0))
            assert same_bits(task_of(a, three, 1), task_of(a, one, 0))


@every_network
def test_gradients_are_the_sum_of_the_tasks_in_their_order(name: str) -> None:
    a = network_call(name, 3)
    count = len(a.params)
    if a.spec.has(STARTS):
        pytest.skip("every task has parameters of its own")
    for whole, single in zip(bits(a), bits(apart(a)), strict=True):
        sums = [(g[0] + g[1]) + g[2] for g in single[1][:count]]
        assert same_bits((whole[0], whole[1][:count]), (single[0], sums))


def with_nan(a: InnerLoopArgs, task: int) -> tuple[InnerLoopArgs, InnerLoopArgs]:
    """A call, and the same with a NaN in one task: in a sample, or where that is made of ids in its weight."""
    if a.query_x[0].is_floating_point():
        x = a.query_x[0].clone()
        x[task, 0, 0] = float("nan")
        return a, a._replace(query_x=[x])
    mask = torch.ones(a.query_x[0].shape[:2], dtype=a.params[0].dtype)
    spoilt = mask.clone()
    spoilt[task, 0] = float("nan")
    return a._replace(query_mask=mask), a._replace(query_mask=spoilt)


@every_network
def test_nan_stays_in_its_task(name: str) -> None:
    """One block takes all tasks in turn: what the second leaves on the chip and in the workspace is NaN."""
    a, dirty = with_nan(apart(network_call(name, 4)), 1)
    for chip in (200_000, 0):
        clean = bits(a, most_blocks=1, chip=chip)
        spoilt = bits(dirty, most_blocks=1, chip=chip)
        for before, after in zip(clean, spoilt, strict=True):
            loss = after[0][0].reshape(-1, 4)[-1]
            assert loss.isnan().tolist() == [False, True, False, False]
            for task in (0, 2, 3):
                assert same_bits(task_of(a, after, task), task_of(a, before, task))


# --- the engine's own tests -------------------------------------------------------------------------------------------

# Of the promises those that are not about memory, instruction sets and threads of the CPU's engine.
ENGINE_TESTS = {
    "engine/test_engine.py": "test",
    "engine/test_engine_promises.py": "random_calls_repeat or same_bits_in_any_batch or nan",
    "engine/test_engine_numerics.py": "test",
    "ops/test_inner_loop.py": CUDA_HOST,
    "ops/test_data_gradients.py": CUDA_HOST,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINE_TESTS)
def test_the_engines_tests_over_the_kernel(name: str) -> None:
    arguments = {"module": "cases.cuda_engine", "seconds": 3600, "MTML_TEST_ENGINE": CUDA_HOST}
    script("run_engine_tests", name, ENGINE_TESTS[name], **arguments)


def test_the_backend_is_gone_after_its_test() -> None:
    """Others ask which there are."""
    assert CUDA_HOST not in BACKENDS.names()
