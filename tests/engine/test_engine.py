"""The compiled CPU engine against the reference in float64: random programs and options, then every internal path."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases.engine import (
    ALL_FORMS,
    ENGINE,
    GROUPS,
    LOSSES,
    Draft,
    Value,
    check,
    converted,
    cotangents_of,
    draft_case,
    evaluate,
    film,
    is_finite,
    mapped,
    mlp,
    outputs_of,
    strided,
    worst_error,
)
from cases.engine_random import random_case, sliced
from cases.inner_loop import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtml_kernels.losses import LossSpec
from mtml_kernels.program import LAYOUT_IN_OUT, LAYOUT_LINEAR, Act, Norm, Op
from mtml_kernels.program.layers.softmax import SOFTMAX, Softmax

seeds, sizes = st.integers(0, 2**40), st.integers(0, 10)


def every_cotangent(case: Case) -> list[Tensor | None]:
    """Unequal values on all outputs."""
    return [torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs_of(case, ENGINE)]


def check_all(case: Case, wanted: Sequence[str] = GROUPS, threads: int = 1) -> None:
    """With cotangents on all outputs (the engine runs again), and on the loss alone (it scales what it carried)."""
    cotangents = every_cotangent(case)
    check(case, cotangents, wanted, threads)
    if case.query_y is not None:
        rest = [None] * (len(cotangents) - 1)
        for on_loss in (cotangents[0], torch.full_like(outputs_of(case, ENGINE)[0], 2.0)):
            check(case, [on_loss, *rest], wanted, threads)


# --- random programs --------------------------------------------------------------------------------------------------


@settings(max_examples=700)
@given(seeds, sizes)
def test_random_programs(seed: int, nodes: int) -> None:
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    wanted = [group for group in GROUPS if rng.random() < 0.7]
    check(case, cotangents_of(case, rng), wanted or ["params"])


@settings(max_examples=100)
@given(seeds, sizes)
def test_random_programs_on_strided_memory(seed: int, nodes: int) -> None:
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    cotangents = [c if c is None else strided(c) for c in cotangents_of(case, rng)]
    check(mapped(case, strided), cotangents)


@settings(max_examples=150)
@given(seeds, sizes)
def test_random_programs_in_float32(seed: int, nodes: int) -> None:
    """Vectors are twice as long here, so other layers count as narrow and other lanes are padding: any such mistake is
    of the order of the values, far above rounding (which test_engine_numerics measures).
    """
    rng = random.Random(seed)
    case = random_case(rng, nodes)
    cotangents = cotangents_of(case, rng)
    small, single = converted(case, torch.float32), [c if c is None else c.float() for c in cotangents]
    expected = evaluate(converted(small, torch.float64), "reference", cotangents)
    theirs = evaluate(small, "reference", single)
    if is_finite(expected) and is_finite(theirs):
        error, usual = (worst_error(r, expected) for r in (evaluate(small, ENGINE, single), theirs))
        assert error < 1e-4 + 100 * usual


# --- every form, by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["linear", "input", "another activation", "one that others read"])
@pytest.mark.parametrize("kind", list(Act), ids=lambda kind: kind.name.lower())
def test_activations_wherever_they_stand(kind: Act, below: str) -> None:
    """Over a linear layer an activation may overwrite its input; over the other values it must not."""
    for other in (Act.TANH, Act.SIN, Act.LEAKY_RELU) if below == "another activation" else (Act.TANH,):
        draft = Draft()
        x = draft.input(1, 17)
        if below != "input":
            x = draft.linear(x, 17)
        y = draft.act(draft.act(x, other), kind) if below == "another activation" else draft.act(x, kind)
        draft.linear(draft.pair(Op.MUL, x, y) if below == "one that others read" else y, 3)
        check_all(draft_case(draft, steps=3, keep=1))


@pytest.mark.parametrize("kind", list(Act), ids=lambda kind: kind.name.lower())
def test_activations_as_output(kind: Act) -> None:
    """The gradient of the loss is read twice there: by the backward pass and by the seeds of the support losses."""
    draft = Draft()
    draft.act(draft.linear(draft.input(1, 3), 5), kind)
    check_all(draft_case(draft, steps=3, loss=LossSpec("l1"), lr_scale=0.3))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("masks", ["none", "some", "empty"])
def test_losses(loss: LossSpec, masks: str) -> None:
    for out, ignored in ((17, False), (1, False), (33, True)):
        draft = mlp([3, 5, out], Act.SILU)
        options: dict[str, Any] = {"tasks": 3, "support": 5, "masks": (masks, masks), "ignored": ignored}
        check_all(draft_case(draft, loss=loss, step_weights=True, **options))
        check_all(draft_case(draft, loss=loss, first_order=True, **options))


@pytest.mark.parametrize("loss", [LossSpec("cross_entropy", label_smoothing=0.2), LossSpec("huber", "sum")], ids=str)
def test_a_loss_of_several_rows(loss: LossSpec) -> None:
    """[N, P, F]: points of a sample are rows; the loss of class ids takes them as one row of features."""
    draft = mlp([3, 17, 5], Act.TANH, rows=4)
    output = draft.view(draft.values[-1], 1) if loss.kind == "cross_entropy" else None
    check_all(draft_case(draft, output, loss=loss, masks=("some", "some")))


BROADCASTS = {  # (rows, features, batched) of two operands
    "same": ((3, 17, True), (3, 17, True)),
    "one row of parameters": ((3, 17, True), (1, 17, False)),
    "rows of parameters": ((3, 17, True), (3, 17, False)),
    "a parameter per row": ((3, 17, True), (3, 1, False)),
    "a scalar": ((3, 17, True), (1, 1, False)),
    "a feature per sample and row": ((3, 17, True), (3, 1, True)),
    "columns times a row": ((3, 1, True), (1, 17, False)),
    "columns times rows": ((3, 1, True), (3, 17, False)),
    "parameters alone": ((1, 17, False), (3, 1, False)),
}


@pytest.mark.parametrize("op", [Op.ADD, Op.MUL], ids=["add", "mul"])
@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcasting(name: str, op: Op) -> None:
    """Both ways round; the operands come out of linear layers, so that their gradients and tangents move."""
    for forms in (BROADCASTS[name], BROADCASTS[name][::-1]):
        draft = Draft()
        operands = []
        for rows, features, batched in forms:
            leaf = draft.input(rows, 2) if batched else draft.param(draft.new_param(1, rows, 2))
            operands.append(draft.act(draft.linear(leaf, features), Act.SIGMOID))
        y = draft.pair(op, *operands)
        if not y.batched:
            y = draft.pair(Op.MUL, draft.input(3, 17), y)
        draft.linear(draft.act(y, Act.SIN), 2)
        check_all(draft_case(draft, support=4, keep=1))


ROWS: dict[str, Callable[[Draft, Value], Value]] = {
    "softmax": lambda draft, x: draft.rows_op(SOFTMAX, x, Softmax.SOFTMAX),
    "log_softmax": lambda draft, x: draft.rows_op(SOFTMAX, x, Softmax.LOG_SOFTMAX),
    "layer_norm": lambda draft, x: draft.rows_op(Op.NORM, x, Norm.LAYER, (0.1, 1.0)),
    "rms_norm": lambda draft, x: draft.rows_op(Op.NORM, x, Norm.RMS, (0.1, 1.0)),
    "rms_norm by the dtype's eps": lambda draft, x: draft.rows_op(Op.NORM, x, Norm.RMS, (-1.0, 1.0)),
    "unit_norm": lambda draft, x: draft.rows_op(Op.NORM, x, Norm.UNIT, (1e-12, 1.0)),
    "unit_norm of short rows": lambda draft, x: draft.rows_op(Op.NORM, x, Norm.UNIT, (1.5, 1.0)),
    "slice": lambda draft, x: sliced(draft, x, 1, x.features - 1),
}


@pytest.mark.parametrize("kind", [Act.RELU, Act.TANH, Act.SIN, Act.SILU], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("name", ROWS)
def test_operations_on_rows(name: str, kind: Act) -> None:
    """Under an activation, which may not overwrite what the operation reads again; and as the output."""
    for rows, features in ((1, 17), (3, 5), (2, 33)):
        draft = Draft()
        x = draft.linear(draft.input(rows, 3), features)
        y = ROWS[name](draft, x)
        z = draft.linear(draft.act(y, kind), y.features)
        ROWS[name](draft, draft.act(draft.pair(Op.MUL, z, sliced(draft, x, 0, y.features)), kind))
        check_all(draft_case(draft, support=4, keep=1))


def test_eps_is_that_of_the_dtype() -> None:
    """Rows as short as eps: that of float32 makes a difference of factors."""
    draft = Draft()
    x = draft.affine(draft.linear(draft.input(3, 4), 5), 3e-4, 0.0)
    draft.linear(draft.rows_op(Op.NORM, x, Norm.RMS, (-1.0, 1.0)), 2)
    case = converted(draft_case(draft, keep=1, lr_scale=1e-4), torch.float32)
    cotangents = every_cotangent(case)
    error = worst_error(evaluate(case, ENGINE, cotangents), evaluate(case, "reference", cotangents))
    wide = evaluate(converted(case, torch.float64), "reference", [c.double() for c in cotangents if c is not None])
    assert error < 1e-3 < 0.03 < worst_error(evaluate(case, "reference", cotangents), wide)


def test_rows_of_zeros_have_no_direction() -> None:
    """relu makes them: a row of zeros stays one, and its gradient is that of x / eps."""
    draft = Draft()
    x = draft.act(draft.affine(draft.linear(draft.input(4, 2), 3), 1.0, -2.0), Act.RELU)
    draft.linear(draft.rows_op(Op.NORM, x, Norm.UNIT, (0.01, 1.0)), 2)
    check_all(draft_case(draft, support=6, lr_scale=0.01, keep=1))


def test_slices_of_inputs_in_place() -> None:
    """Slices read an input element by element where it lies, beside a linear layer that does."""
    draft = Draft()
    x = draft.input(2, 11)
    both = draft.cat(sliced(draft, x, 3, 8), sliced(draft, sliced(draft, x, 0, 9), 8, 9))
    draft.pair(Op.ADD, draft.linear(both, 4), draft.act(draft.linear(x, 4), Act.TANH))
    for wanted in (GROUPS, ["params"]):
        check_all(draft_case(draft, support=4, keep=1), wanted)


@pytest.mark.parametrize("outputs", [1, 3, 17, 70])
@pytest.mark.parametrize("lr", ["all", "element_per_step"])
def test_weights_stored_in_out(outputs: int, lr: str) -> None:
    draft = Draft()
    x = draft.act(draft.linear(draft.input(1, 5), 33, draft.new_param(LAYOUT_IN_OUT, 33, 5)), Act.RELU)
    draft.linear(x, outputs, draft.new_param(LAYOUT_IN_OUT, outputs, 33))
    check_all(draft_case(draft, lr=lr, keep=2, steps=3))


@pytest.mark.parametrize("layout", [LAYOUT_LINEAR, LAYOUT_IN_OUT], ids=["out-in", "in-out"])
@pytest.mark.parametrize("hidden", [1, 3, 17, 40])
def test_tied_autoencoders(hidden: int, layout: int) -> None:
    """Encoder and decoder by one weight: sigmoid leaves halves in the padding, the gradient must not."""
    for last in (Act.SIGMOID, Act.RELU):
        draft = Draft()
        weight = draft.new_param(layout, hidden, 9)
        x = draft.act(draft.linear(draft.input(2, 9), hidden, weight), last)
        x = draft.act(draft.linear_back(x, weight), last)
        draft.linear_back(draft.linear(x, hidden, weight), weight)
        check_all(draft_case(draft, support=4, keep=1, lr="element"))
        check_all(draft_case(draft, support=300, keep=1))


@pytest.mark.parametrize("lr", ALL_FORMS)
@pytest.mark.parametrize("wanted", [GROUPS, ["params"], ["lr"], ["support_x"], ["query_x"], ["lr", "query_x"]], ids=str)
def test_rates_and_wanted_gradients(lr: str, wanted: Sequence[str]) -> None:
    draft = film(3, 17, 5, latent=4)
    for steps in (0, 1, 4):
        case = draft_case(draft, steps=steps, lr=lr, keep=2, step_weights=True)
        check_all(case, wanted)


ADAPTED = {
    "only a latent": lambda draft: [i == 0 for i in range(len(draft.params))],
    "only biases": lambda draft: [layout == 1 for layout, *_ in draft.params],
    "only weights": lambda draft: [layout == 0 for layout, *_ in draft.params],
    "only the head": lambda draft: [i >= len(draft.params) - 2 for i in range(len(draft.params))],
    "only the first layer": lambda draft: [i in (1, 2) for i in range(len(draft.params))],
    "nothing": lambda draft: [False] * len(draft.params),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_subsets(name: str, first_order: bool) -> None:
    draft = film(3, 17, 5, latent=4, rows=2)
    adapted = ADAPTED[name](draft)
    for keep, lr in ((0, "all"), (2, "element_per_step" if any(adapted) else "all_per_step")):
        case = draft_case(draft, adapted=adapted, lr=lr, keep=keep, steps=3, first_order=first_order)
        check_all(case)
        check_all(case, ["params"])


@pytest.mark.parametrize("layout", [0, 1])
def test_a_parameter_that_nothing_uses(layout: int) -> None:
    """It stays where it is, its rate has no gradient, and its own gradient is what the caller sends to it."""
    for lr, position in itertools.product(("all", "tensor", "element_per_step"), (0, -1)):
        draft = Draft()
        if position == 0:
            draft.new_param(layout, 3, 17)
        draft.linear(draft.act(draft.linear(draft.input(1, 3), 5), Act.TANH), 2)
        if position == -1:
            draft.new_param(layout, 3, 17)
        check_all(draft_case(draft, lr=lr, keep=2))


def test_shared_weights() -> None:
    """One weight in three layers, one of them over parameters alone, and one bias as shift and as scale too."""
    draft = Draft()
    weight, bias = draft.new_param(0, 9, 9), draft.new_param(1, 9)
    code = draft.linear(draft.param(draft.new_param(1, 9)), 9, weight, bias)
    x = draft.input(2, 9)
    for _ in range(2):
        x = draft.act(draft.linear(x, 9, weight, bias), Act.TANH)
        x = draft.pair(Op.MUL, draft.pair(Op.ADD, x, code), draft.param(bias))
    check_all(draft_case(draft, steps=3, keep=2, lr="element_per_step"))


def test_several_inputs_and_views_of_them() -> None:
    draft = Draft()
    a, b = draft.input(1, 12), draft.input(3, 5)
    again, points = draft.input(1, 15, index=1), draft.input(3, 4, index=0)
    both = draft.cat(draft.linear(points, 7), b)
    far = draft.expand(draft.param(draft.new_param(1, 3)), 1)
    rest = draft.cat(draft.cat(draft.pair(Op.MUL, a, a), again), far)
    draft.linear(draft.act(draft.cat(draft.view(both, 1), rest), Act.GELU), 3)
    check_all(draft_case(draft, support=4, keep=1))


@pytest.mark.parametrize("query", [None, 0, 1])
@pytest.mark.parametrize("targets", [True, False])
def test_query_sets(query: int | None, targets: bool) -> None:
    """None: the loop adapts only. Without targets there is an output to differentiate, and no loss."""
    case = draft_case(mlp([3, 5, 2], Act.TANH), query=query, targets=targets, keep=2, step_weights=True)
    check_all(case)


def test_one_of_everything() -> None:
    for size in (1, 2):
        check_all(draft_case(mlp([size, 1, 1], Act.SIGMOID), tasks=1, support=1, query=1, steps=1, keep=1))


def test_step_weights_that_are_zero_cost_nothing_and_count_nothing() -> None:
    case = draft_case(mlp([3, 5, 2], Act.TANH), steps=3)
    last = dataclasses.replace(case, step_weights=torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    cotangents = every_cotangent(case)
    assert worst_error(evaluate(last, ENGINE, cotangents), evaluate(case, ENGINE, cotangents)) == 0


# --- the paths of the plan (csrc/cpu/inner_loop/plan/plan.cpp) --------------------------------------------------------

# Cotangents that make the whole way back run: step weights, all steps kept, seeds from the support losses.
WHOLE: dict[str, Any] = {"keep": 2, "step_weights": True}


@pytest.mark.parametrize("samples", [511, 512, 600, 1031])
def test_chunks_of_many_samples(samples: int) -> None:
    """512 rows make two chunks, 1031 make four of unequal sizes; the wide layers cut each into blocks."""
    draft = mlp([2, 33, 33, 3], Act.SIN, (3.0, 0.0))
    check_all(draft_case(draft, support=samples, query=700, lr="tensor_per_step", masks=("some", "some"), **WHOLE))


@pytest.mark.parametrize("samples", [1, 3, 17])
def test_chunks_of_samples_with_many_rows(samples: int) -> None:
    """300 rows a sample: a chunk a sample, but at most 16, so that 17 samples leave some chunks without any."""
    draft = film(2, 17, 1, latent=5, rows=300)
    check_all(draft_case(draft, support=samples, query=samples, tasks=2, steps=1, keep=1))


def test_blocks_without_chunks() -> None:
    """250 samples of 500 numbers a plane: one chunk of several blocks, with values of parameters alone beside them."""
    draft = film(3, 200, 5, latent=7)
    for lr in ("all", "element"):  # the second: products cannot write the next parameters directly
        check_all(draft_case(draft, support=250, query=130, tasks=1, lr=lr, **WHOLE))


def test_planes_computed_again() -> None:
    """Five steps of 250 samples with 2 x 2 x 700 numbers are over 16 MiB: no step keeps its planes."""
    draft = mlp([3, 350, 350, 2], Act.TANH)
    check_all(draft_case(draft, support=250, query=3, tasks=1, steps=5, weight_scale=0.5, **WHOLE))


@pytest.mark.parametrize("act", [Act.TANH, Act.RELU])  # the products apply relu themselves
@pytest.mark.parametrize("samples", [1, 97, 130])
def test_products_deeper_than_a_part(act: Act, samples: int) -> None:
    """Depths of 290 and 270 are taken in parts, 96 rows at a time (simd/gemm.h), with one product and with two."""
    draft = mlp([3, 290, 270, 2], act)
    check_all(draft_case(draft, support=samples, query=samples, tasks=1, steps=2, weight_scale=0.5, **WHOLE))


@pytest.mark.parametrize("steps", [4, 5, 9])
def test_segments_between_checkpoints(steps: int) -> None:
    """1.1 million parameters and their transposes take 18 MB a step: above 64 MiB only every second or third step is
    kept, and the steps between are run again; nine steps are three whole segments.
    """
    draft = mlp([5, 1000, 1000, 2], Act.TANH)
    options: dict[str, Any] = {"tasks": 1, "support": 2, "query": 1, "steps": steps, "weight_scale": 0.5}
    check(case := draft_case(draft, lr="tensor_per_step", **options, **WHOLE), every_cotangent(case))
    check(case := draft_case(draft, **options), every_cotangent(case), ["params"])


@pytest.mark.parametrize("tasks", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_carry_summed_over_tasks(tasks: int, threads: int) -> None:
    """11 000 parameters are over 64 KiB: one sum over the tasks (in groups of four) is carried, and computed again
    where the cotangents differ.
    """
    case = draft_case(mlp([3, 100, 100, 5], Act.RELU), tasks=tasks, steps=2, lr="tensor", weight_scale=0.7)
    check_all(case, threads=threads)


@pytest.mark.parametrize("out", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Act.SIGMOID, Act.COS])
def test_narrow_layers(out: int, kind: Act) -> None:
    """Few outputs: the weight is kept as rows, and the input's padding (0.5, or 1, behind these) must not count."""
    for rows, width in itertools.product((1, 13), (1, 7, 33)):
        check_all(draft_case(mlp([3, width, out, out, 2], kind, rows=rows), support=3, lr="element"))


def test_threads_share_one_task() -> None:
    """One task, two threads, four chunks: the threads split the chunks, also those of parameters alone."""
    for draft in (mlp([2, 33, 33, 3], Act.SIN), film(2, 17, 3, latent=5)):
        check_all(draft_case(draft, support=1024, query=600, tasks=1, **WHOLE), threads=2)
