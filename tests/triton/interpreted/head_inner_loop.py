"""Tests of the Triton head_inner_loop through its interpreter: test_triton_head_inner_loop.py runs them elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.head_inner_loop import DIFFERENTIABLE, HeadCase, gradients, make_head_case, total
from cases.triton_watch import watched
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_head_inner_loop import CASES, LOSSES, RATES, Sizes, check_equal_to_weight_space, problem, strided
from torch import Tensor

from mtml_kernels import head_inner_loop
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.losses import LossSpec
from mtml_kernels.schema.head_inner_loop import HeadArgs
from mtml_kernels.triton import head_inner_loop as kernel
from mtml_kernels.triton.head_inner_loop.policy import launch_of

sys.path.append(str(Path(__file__).resolve().parents[3]))  # bench/ is not installed
from bench.gpu import head_inner_loop as gpu

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_head_inner_loop.py, which sets the interpreter up"
# The interpreter computes padding, which is masked, in numpy, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERYTHING: dict[str, Any] = {"masks": True, "groups": 2, "decay": 0.3, "proximal": 0.1}
COVERED = ("no_tasks", "masks", "decay", "one_step")  # by other tests here; a launch takes 0.1 s and more
# in float64 18 samples are too many for gram to stay on chip
IN_MEMORY: dict[str, Any] = {"tasks": 1, "support": 18, "query": 17, "features": 7, "steps": 2}


# --- the same as the loop over weights, in float64 --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CASES if n not in COVERED])
def test_equal_to_weight_space(name: str) -> None:
    check_equal_to_weight_space(make_head_case(**({"tasks": 1} | CASES[name])), "triton")


def test_launches_go_to_the_device_of_the_tensors() -> None:
    with watched(outside=False, reused=False) as watch:  # there are barriers
        check_equal_to_weight_space(make_head_case(tasks=1, steps=1), "triton")
    assert watch.launches and "unguarded" not in {conflict.kind for conflict in watch.conflicts}


def test_programs_do_not_meet() -> None:
    """No byte is written by two programs, written by one and read by another, or outside of what a launch is given."""
    a = make_head_case(tasks=2, support=6, query=11, features=70, classes=3, steps=2).args._replace(needs=31)
    with watched(reused=False) as watch:
        loss, *_, carry = kernel.forward(a)
        kernel.backward((torch.full_like(loss, 2.0), None, None, None), a, carry)
    assert watch.launches == 4 and not watch.conflicts


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_every_loss(loss: LossSpec) -> None:
    check_equal_to_weight_space(make_head_case(loss=loss, masks=True, tasks=1, steps=2), "triton")


@pytest.mark.parametrize(
    "options",
    [EVERYTHING, {"support": 35, "classes": 17, "query": 5}, {"bias": False, "loss": LossSpec("mse")}],
    ids=["everything", "blocks", "no_bias"],
)
def test_gram_in_memory(options: dict[str, Any]) -> None:
    case = make_head_case(**(IN_MEMORY | options))
    assert not launch_of(case.args.support.shape[1], len(case.args.weight), 8).on_chip
    check_equal_to_weight_space(case, "triton")


@pytest.mark.slow
@settings(max_examples=4)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 20, 20, 40, 18))),
    steps=st.integers(0, 3),
    loss=st.sampled_from(LOSSES),
    groups=st.integers(1, 2),
    masks=st.booleans(),
    decay=st.sampled_from([0.0, 0.2]),
    proximal=st.sampled_from([0.0, 0.3]),
)
def test_any_size(sizes: tuple[int, ...], **options: Any) -> None:
    names = ("tasks", "support", "query", "features", "classes")
    check_equal_to_weight_space(make_head_case(**dict(zip(names, sizes, strict=True)), **options), "triton")


def test_on_chip_with_products_of_cublas() -> None:
    case = make_head_case(tasks=1, support=9, classes=9, steps=2)
    launch = launch_of(9, 9, 8)
    assert launch.on_chip and not launch.narrow
    check_equal_to_weight_space(case, "triton")


def test_features_wider_than_a_block_and_tasks_apart() -> None:
    """Of the launches around the steps: several blocks of rows and of columns, tasks that are views of one tensor."""
    case = make_head_case(tasks=2, support=6, query=11, features=70, classes=3, steps=2)
    assert launch_of(6, 3, 8).narrow
    both = torch.cat([case.args.support, case.args.query], 1)
    sets = both.split((6, 11), 1)
    assert not any(t.is_contiguous() for t in sets)
    check_equal_to_weight_space(case.replace(support=sets[0], query=sets[1]), "triton")


def test_masks_of_zeros_and_ignored_labels() -> None:
    case = make_head_case(tasks=3, masks=True)
    case.args.support_mask[0] = 0  # type: ignore[index]
    case.args.query_mask[1] = 0  # type: ignore[index]
    case.args.labels[1, :2] = -100
    case.args.query_labels[2] = -100  # type: ignore[index]
    check_equal_to_weight_space(case, "triton")
    loss, _, support_losses, coefficients = case.call("triton")
    assert (support_losses[:, 0] == 0).all() and (coefficients[0] == 0).all() and (loss[1:] == 0).all()


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_through_the_documented_function(rate: str) -> None:
    sets, query_labels = problem()
    leaves = [t for t in sets if t.is_floating_point()]
    found = []
    for backend in ("triton", "cpu"):
        options = {"steps": 3, "query_labels": query_labels, "adapted": True, "backend": backend}
        result = head_inner_loop(*sets, RATES[rate], **options)
        found.append((*result, *torch.autograd.grad(total(tuple(result)), leaves)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    case = make_head_case(**EVERYTHING, tasks=1, steps=2)
    tensors = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(lambda *t: case.with_tensors(t).call("triton"), tensors, fast_mode=True)


def test_second_order_is_not_first_order() -> None:
    """Negative control: constant residuals give another gradient of the weight."""
    case = make_head_case(steps=10).requiring_grad()
    loss, _, _, constants = case.call("triton")
    exact = torch.autograd.grad(loss.sum(), case.args.weight)[0]
    own = case.args.weight - constants[:, 0].detach() @ case.args.support
    logits = case.args.query @ own.mT + (case.args.bias - constants[:, 0].detach().sum(-1))[:, None]  # type: ignore[operator]
    first_order = torch.nn.functional.cross_entropy(logits.mT, case.args.query_labels, reduction="none").mean(1)
    torch.testing.assert_close(first_order, loss)
    first = torch.autograd.grad(first_order.sum(), case.args.weight)[0]
    assert (exact - first).norm() > 0.05 * exact.norm()


def test_the_second_derivative_raises() -> None:
    case = make_head_case().requiring_grad()
    first = torch.autograd.grad(case.call("triton")[0].sum(), case.tensors(), create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiable once.*backend="general"'):
        torch.autograd.grad(first[2].sum(), [case.args.weight])


def test_one_gradient_at_a_time() -> None:
    case = make_head_case(groups=2, decay=0.1, tasks=1)
    for name, expected in zip(DIFFERENTIABLE, gradients(case, "triton"), strict=True):
        one = case.replace()
        leaf = getattr(one.args, name).clone().requires_grad_()
        outputs = one.replace(**{name: leaf}).call("triton")
        assert torch.equal(torch.autograd.grad(total(outputs), leaf)[0], expected)


@pytest.mark.parametrize("name", ["plain", "decay_two_rates", "no_steps", "no_tasks"])
def test_scaled_carry_equals_another_launch(name: str) -> None:
    case = make_head_case(**CASES[name]).requiring_grad()
    outputs = case.call("triton")
    weights = torch.linspace(-1, 2, len(outputs[0]), dtype=outputs[0].dtype)
    carried = torch.autograd.grad(outputs[0], case.tensors(), weights, retain_graph=True)
    zeros = [weights, *(torch.zeros_like(t) for t in outputs[1:])]
    again = torch.autograd.grad(outputs, case.tensors(), zeros)
    torch.testing.assert_close(carried, again, rtol=1e-10, atol=1e-12)


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two_rates", "no_targets", "no_tasks"])
def test_opcheck_and_both_doors(name: str) -> None:
    case = make_head_case(**CASES[name]).requiring_grad()
    needs = sum(1 << i for i, t in enumerate(case.args[:5]) if t is not None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*case.args._replace(needs=needs), "triton")
    torch.library.opcheck(torch.ops.mtml.head_inner_loop.default, arguments, test_utils=tests)
    found = []
    for outputs in (case.call("triton"), case.op("triton")):
        grads = torch.autograd.grad(total(outputs), case.tensors(), allow_unused=True, materialize_grads=True)
        found.append((*outputs, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_under_torch_compile() -> None:
    case = make_head_case(masks=True, steps=1).requiring_grad()
    expected = gradients(case, "triton")
    run = torch.compile(lambda c: total(c.call("triton")), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(run(case), case.tensors()), expected)


# --- promises ---------------------------------------------------------------------------------------------------------


def single(case: HeadCase) -> HeadCase:
    """In float32."""
    tensors = (t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.args)
    return HeadCase(HeadArgs._make(tensors), case.options)


def test_equal_calls_give_equal_bits() -> None:
    for sizes in ({"tasks": 1}, IN_MEMORY | {"support": 33}):
        case = single(make_head_case(**sizes, **EVERYTHING))
        runs = [(*case.call("triton"), *gradients(case, "triton")) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bits_do_not_depend_on_the_tasks_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the launch: the products of the features are another library's."""
    case = single(make_head_case(tasks=3, **EVERYTHING))
    a = case.args._replace(needs=31)
    products = kernel._products(a, launch_of(a.support.shape[1], len(a.weight), 4))
    together = kernel.forward(a)
    monkeypatch.setattr(kernel, "_products", lambda *_: tuple(p[1:2] for p in products))
    per_task = ("support", "query", "labels", "query_labels", "support_mask", "query_mask")
    alone = kernel.forward(a._replace(**{name: getattr(a, name)[1:2] for name in per_task}))
    for i, (both, one) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(both[:, 1:2] if i == 2 else both[1:2], one)


def test_bits_of_few_shot_heads_do_not_depend_on_the_tasks_beside() -> None:
    """Those of the products and of the features' gradients too, which are launches of this project there."""
    a = single(make_head_case(tasks=3)).args._replace(needs=15)
    assert launch_of(a.support.shape[1], len(a.weight), 4).narrow
    per_task = ("support", "query", "labels", "query_labels", "support_mask", "query_mask")
    one = {name: t if (t := getattr(a, name)) is None else t[1:2] for name in per_task}
    found = []
    for call in (a, a._replace(**one)):
        loss, *_, carry = kernel.forward(call)
        found.append((loss, *kernel.backward((torch.full_like(loss, 2.0), None, None, None), call, carry)[:2]))
    for both, alone in zip(*found, strict=True):
        assert both is not None and torch.equal(both[1:2], alone)


def test_views_and_expanded_cotangents() -> None:
    case = make_head_case(masks=True, groups=2)
    other = HeadCase(HeadArgs._make(strided(t) if isinstance(t, Tensor) else t for t in case.args), case.options)
    found = []
    for c in (other, case):
        leaves = [t.requires_grad_() for t in c.tensors()]
        outputs = c.call("triton")
        ones = [torch.ones((), dtype=t.dtype).expand(t.shape) for t in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, ones)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_nan_or_a_label_out_of_range_stays_in_its_task() -> None:
    clean = make_head_case(tasks=3, steps=2)
    features = clean.args.support.clone()
    features[1, 0, 0] = float("nan")
    labels, query_labels = clean.args.labels.clone(), clean.args.query_labels.clone()  # type: ignore[union-attr]
    labels[1, 2], query_labels[1, 0] = 10**9, -1
    expected = clean.call("triton")
    for dirty in ({"support": features}, {"labels": labels}, {"query_labels": query_labels}):
        found = clean.replace(**dirty).call("triton")
        assert found[0].isnan().tolist() == [False, True, False]
        for a, b in zip((expected[0], expected[1], expected[3]), (found[0], found[1], found[3]), strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_autocast_leaves_the_products_alone() -> None:
    case = single(make_head_case())
    expected = case.call("triton")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.call("triton")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_weight_of_a_task_is_formed() -> None:
    tasks, classes, features = 3, 5, 64
    a = make_head_case(tasks=tasks, features=features, classes=classes, steps=1).args._replace(needs=31)
    with Sizes() as seen:
        *outputs, carry = kernel.forward(a)
        kernel.backward((torch.ones_like(outputs[0]), None, None, None), a, carry)
    assert (tasks, 4, features) in seen.shapes and (classes, features) in seen.shapes
    assert seen.shapes.isdisjoint({(tasks, classes, features), (tasks, features, classes), (tasks * classes, features)})


def test_shapes_beyond_the_registers_are_refused_before_a_launch() -> None:
    case = make_head_case(tasks=1, support=129, classes=17, steps=1)
    with pytest.raises(BackendUnavailable, match=r"expected S x C of at most 2048.*got S = 129, C = 17: 256 x 32"):
        case.call("triton")
    with pytest.raises(ValueError, match="Way out: backend='reference'"):
        kernel.forward(case.args)
    with pytest.raises(ValueError, match=r"rates: expected \[1, K, C\] where there is no bias"):
        kernel.forward(make_head_case(groups=2).args._replace(bias=None))


@pytest.mark.slow
@pytest.mark.parametrize("losses", [("cross_entropy", "cross_entropy"), ("bce_with_logits", "mse")])
def test_float32_errors_are_no_worse_than_twice_pytorchs(losses: tuple[str, str]) -> None:
    sizes: dict[str, Any] = {"tasks": 1, "support": 10, "query": 15, "features": 300, "classes": 5, "steps": 2}
    ratios = []
    for seed in range(20):
        case = single(
            make_head_case(**sizes, loss=LossSpec(losses[0]), query_loss=LossSpec(losses[1]), masks=True, seed=seed)
        )
        exact = HeadCase(
            HeadArgs._make(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case.args),
            case.options,
        )
        errors = []
        truth = results(exact, lambda c: c.by_weights())
        for run in (lambda c: c.call("triton"), lambda c: c.by_weights()):
            found = results(case, run)
            errors.append([float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)])
        ratios.append([ours / max(theirs, 1e-8) for ours, theirs in zip(*errors, strict=True)])
    assert (torch.tensor(ratios).median(0).values < 2).all(), torch.tensor(ratios).median(0).values


def results(case: HeadCase, run: Any) -> list[Tensor]:
    """Loss, logits and all gradients of the loss, in float64."""
    case = case.requiring_grad()
    outputs = run(case)[:2]
    grads = torch.autograd.grad(outputs[0].sum(), case.tensors())
    return [t.detach().double() for t in (*outputs, *grads)]


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_compares_before_it_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.CASES, "tiny", gpu.Shape(2, 4, 3, 6, 3, 2))
    gpu.run_case("tiny", ["vmap", "mtml"], "cpu", 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines) == ["mtml", "vmap"]
    assert any("x the fastest peer" in line for line in lines) and not any("mismatch" in line for line in lines)
    monkeypatch.setattr(gpu, "error", lambda *_: float("nan"))
    gpu.run_case("tiny", ["mtml"], "cpu", 0.01)
    assert "mismatch" in capsys.readouterr().out
