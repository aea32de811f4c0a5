"""The engine's low-rank form: shared weights and corrections of low rank, instead of weights for every task."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases.engine import (
    GROUPS,
    LOSSES,
    check,
    converted,
    cotangents_of,
    draft_case,
    evaluate,
    mlp,
    outputs_of,
    problem,
    same_bits,
    worst_error,
)
from cases.engine_random import random_case
from cases.inner_loop import Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mtml
from mtml_kernels.losses import LossSpec
from mtml_kernels.native.inner_loop import LOW_RANK
from mtml_kernels.native.inner_loop import low_rank_weights as counted
from mtml_kernels.program import Act

LOW = "cpu:low_rank"
seeds = st.integers(0, 2**40)
RATES = ["all", "all_per_step", "tensor", "tensor_per_step"]


def low_rank_weights(case: Case) -> int:
    sizes = case.support_y.shape[1], case.query_x[0].shape[1] if case.query_x else 0
    return counted(case.params, case.lr, case.spec, *sizes, LOW_RANK)


def on_loss(case: Case, value: float = 1.0) -> list[Tensor | None]:
    loss, *rest = outputs_of(case, "cpu")
    return [torch.full_like(loss, value), *[None for _ in rest]]


def random_mlp(rng: random.Random) -> Case:
    """Chains with any activation, any of the options that low-rank form takes."""
    widths = [rng.choice([1, 3, 5, 8, 17, 33, 65, 130]) for _ in range(rng.randint(1, 4))]
    draft = mlp([*widths, rng.choice([5, 9, 17, 33])], rng.choice(list(Act)), rows=rng.choice([1, 1, 3]))
    loss = rng.choice([loss for loss in LOSSES if loss.kind != "cross_entropy" or draft.values[-1].rows == 1])
    return problem(
        rng,
        draft,
        adapted=[rng.random() < 0.8 for _ in draft.params],
        tasks=rng.choice([1, 2, 5, 11]),
        support=rng.randint(1, 7),
        query=rng.choice([None, 1, 4, 30]),
        steps=rng.randint(0, 4),
        loss=loss,
        lr=rng.choice(RATES),
        masks=[rng.choice(["none", "some", "empty"]) for _ in range(2)],
        first_order=rng.random() < 0.2,
    )


# --- values and all gradients ---------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(seeds)
def test_random_networks(seed: int) -> None:
    rng = random.Random(seed)
    case = random_mlp(rng)
    wanted = [group for group in GROUPS if rng.random() < 0.7]
    assume(any(flag and layout == 0 for flag, (layout, _, _) in zip(case.spec.adapted, layouts(case), strict=True)))
    try:
        check(case, cotangents_of(case, rng), wanted or ["params"], rng.choice([1, 2, 3]), LOW)
    except ValueError as error:
        assert "cpu:low_rank" in str(error)
        assume(False)


def layouts(case: Case) -> list[tuple[int, ...]]:
    _, inputs, params = case.spec.program[:3]
    ints = case.spec.program[5 + inputs :]
    return [tuple(ints[3 * i : 3 * i + 3]) for i in range(params)]


@settings(max_examples=150)
@given(seeds, st.integers(2, 10))
def test_random_programs(seed: int, nodes: int) -> None:
    """Shared weights, layers of parameters, views, broadcasts: what does not admit the form stays as it was."""
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, keep=0), step_weights=None)
    cotangents = cotangents_of(case, rng)
    try:
        check(case, cotangents, ["params", "lr"], backend=LOW)
    except ValueError as error:
        assert "cpu:low_rank" in str(error)
        assume(False)


CASES: dict[str, Case] = {
    "one step": draft_case(mlp([70, 40, 33, 5]), tasks=7, support=5, query=15, steps=1, loss=LossSpec("cross_entropy")),
    "five steps": draft_case(mlp([70, 40, 33, 5], Act.SIGMOID), tasks=4, steps=5, lr="tensor_per_step"),
    # more rows than are summed at once, from one task and from several
    "long": draft_case(mlp([30, 40, 5], Act.TANH), tasks=3, support=4, query=300, steps=2),
    # more inputs and outputs than a unit has
    "wide": draft_case(mlp([450, 530, 9], Act.TANH), tasks=5, support=2, query=3, steps=1, lr="tensor"),
    "rows of a sample": draft_case(mlp([17, 33, 5], Act.SIN, rows=6), tasks=5, steps=2),
    "first order": draft_case(mlp([70, 40, 5], Act.TANH), tasks=3, steps=3, first_order=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_cotangent(name: str) -> None:
    case = CASES[name]
    assert low_rank_weights(case) > 0
    outputs = outputs_of(case, "cpu")
    unequal: list[Tensor | None] = [torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    for cotangents in (on_loss(case, 0.7), [unequal[0], None, None], unequal, [None, None, unequal[2]]):
        check(case, cotangents, ["params", "lr"], backend=LOW)
    check(case, unequal, GROUPS, backend=LOW)


def test_first_order_differs() -> None:
    """A second-order term that is left out would pass every test of the values alone."""
    case = CASES["five steps"]
    first = dataclasses.replace(case, spec=dataclasses.replace(case.spec, first_order=True))
    cotangents = on_loss(case)
    assert worst_error(evaluate(first, LOW, cotangents), evaluate(case, LOW, cotangents)) > 1e-3


# --- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_any_threads(name: str) -> None:
    case = converted(CASES[name], torch.float32)
    for cotangents in (on_loss(case), [torch.ones_like(t) for t in outputs_of(case, "cpu")]):
        first = evaluate(case, LOW, cotangents)
        for threads in (1, 2, 3, 5):
            assert same_bits(evaluate(case, LOW, cotangents, threads=threads), first), threads


def only(case: Case, order: Sequence[int]) -> Case:
    names = ("support_y", "query_y", "support_mask", "query_mask")
    picked: dict[str, Any] = {n: None if (t := getattr(case, n)) is None else t[list(order)] for n in names}
    xs: dict[str, Any] = {n: [x[list(order)] for x in getattr(case, n)] for n in ("support_x", "query_x")}
    return dataclasses.replace(case, **picked, **xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_gives_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    pool = converted(draft_case(mlp([70, 40, 33, 5]), tasks=9, support=5, query=15, steps=2), dtype)

    def of_task(case: Case, position: int, threads: int) -> list[Tensor]:
        one = torch.zeros(len(case.support_y), dtype=dtype)
        one[position] = 1
        (loss, output, support), grads = evaluate(case, LOW, [one, None, None], ["params"], threads)
        return [loss[position], output[position], support[:, position], *grads]

    alone = of_task(only(pool, [4]), 0, 1)
    for size, position in ((2, 0), (5, 3), (9, 8)):
        order = [0, 1, 2, 3, 5, 6, 7, 8][: size - 1]
        order.insert(position, 4)
        found = of_task(only(pool, order), position, 1 + size % 3)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), (size, position)


@pytest.mark.parametrize("group", ["support_x", "query_x"])
def test_nan_stays_in_its_task(group: str) -> None:
    case = only(CASES["one step"], range(7))
    clean = evaluate(case, LOW, on_loss(case), ["params"])[0]
    getattr(case, group)[0][3, 1] = float("nan")
    dirty = evaluate(case, LOW, on_loss(case), ["params"])[0]
    rest = [0, 1, 2, 4, 5, 6]
    assert dirty[0].isnan().tolist() == [task == 3 for task in range(7)]
    assert torch.equal(dirty[0][rest], clean[0][rest]) and torch.equal(dirty[1][rest], clean[1][rest])


@pytest.mark.parametrize("name", ["one step", "five steps", "wide"])
def test_float32_errors_are_pytorchs(name: str) -> None:
    """Medians over 21 seeds of (our error / the reference's in float32), both against float64: at most 2."""
    ratios = []
    sizes = {"one step": [70, 40, 33, 5], "five steps": [70, 40, 33, 5], "wide": [450, 530, 9]}[name]
    for seed in range(21):
        options: dict[str, Any] = {"tasks": 4, "support": 5, "query": 15, "steps": 5 if name == "five steps" else 1}
        case = problem(random.Random(seed), mlp(sizes), loss=LossSpec("cross_entropy"), dtype=torch.float32, **options)
        ones = torch.ones(4)
        exact = evaluate(converted(case, torch.float64), "reference", [ones.double(), None, None], ["params"])
        ours, theirs = (evaluate(case, backend, [ones, None, None], ["params"]) for backend in (LOW, "reference"))
        ratios.append(worst_error(ours, exact) / worst_error(theirs, exact))
    assert statistics.median(ratios) <= 2


# --- the choice -------------------------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5))
    sy, qy = torch.randint(5, (3, 5)), torch.randint(5, (3, 75))
    return model, [torch.randn(3, 5, 784), sy, torch.randn(3, 75, 784), qy]


def gradients(model: nn.Module, backend: str, batch: Sequence[Tensor], **options: Any) -> list[Tensor]:
    loss = mtml.MAML(model, 0.1, backend=backend, **options).meta_loss(*batch).mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_chosen_by_sizes_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = network()
    chosen = mtml.MAML(model, 0.1).explain(*batch)
    assert chosen.low_rank >= 1 and "low-rank corrections" in str(chosen)
    assert mtml.MAML(model, 0.1, backend="cpu:weights").explain(*batch).low_rank == 0
    assert mtml.MAML(model, 0.1, backend=LOW).explain(*batch).low_rank == 3
    long = mtml.MAML(model, 0.1, steps=60).explain(*batch)  # rank 300: more than what a task's own weights take
    assert long.low_rank == 0
    small = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
    sine = [torch.randn(4, 10, 1) for _ in range(4)]
    assert mtml.MAML(small, 0.1, loss="mse").explain(*sine).low_rank == 0


def test_both_forms_agree() -> None:
    model, batch = network()
    ours, theirs = (gradients(model, backend, batch) for backend in (LOW, "cpu:weights"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def meta_gradient(case: Case, backend: str, compiled: bool) -> Sequence[Tensor]:
    def mean_loss(case: Case) -> Tensor:
        return case.call(backend)[0].mean()

    torch._dynamo.reset()
    held = case.requiring_grad()
    function = torch.compile(mean_loss, fullgraph=True, backend="aot_eager") if compiled else mean_loss
    return torch.autograd.grad(function(held), held.params)


@pytest.mark.parametrize("backend", [LOW, "cpu"])
def test_compiled(backend: str) -> None:
    """One graph, whose fake carry has the real one's shape: also where the cost model chooses."""
    case = draft_case(mlp([300, 200, 5]), tasks=3, support=2, query=9, steps=1)
    found, expected = (meta_gradient(case, backend, compiled) for compiled in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda maml, batch: maml.adapt_tasks(*batch[:2]), "adapted parameters were asked for"),
        (lambda maml, batch: maml.meta_loss(*batch, step_weights=[0.5, 0.5]), "step_weights were given"),
    ],
)
def test_what_cannot_be_is_named(call: Any, why: str) -> None:
    model, batch = network()
    with pytest.raises(ValueError, match=f'"cpu:low_rank" where {why}'):
        call(mtml.MAML(model, 0.1, backend=LOW), batch)


def test_a_model_without_such_a_layer_is_named() -> None:
    model, data = nn.Linear(3, 1), [torch.randn(2, 4, 3), torch.randn(2, 4, 1)] * 2
    with pytest.raises(ValueError, match="no linear layer of this model admits it"):
        mtml.MAML(model, 0.1, loss="mse", backend=LOW, params=["bias"]).meta_loss(*data)
