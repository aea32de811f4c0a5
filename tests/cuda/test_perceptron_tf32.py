"""The perceptrons' kernels on matrix units, run on the CPU: their errors, their bits, and what they refuse."""

from __future__ import annotations

import functools
import math
import random
import statistics
from typing import Any

import pytest
import torch
from cases.cuda_engine import CUDA_HOST
from cases.cuda_host import ORDERS
from cases.cuda_mlp import CONSTANTS, HostKernels, Results, call_of, parts_of, run, some, tf32_library, with_kernels
from cases.engine import mlp, problem, same_bits
from torch import nn

from mtml import MAML
from mtml_kernels.cuda.inner_loop import describe
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.mlp import OVERLAP, Perceptrons
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import Act
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs

IMAGES = [2, 64, 64, 64, 3]
BOTH = NEED_PARAMS | NEED_LR
SEEDS = range(10)
every_kind = pytest.mark.parametrize("kind", [Act.RELU, Act.SIN], ids=["straight", "bent"])
every_form = pytest.mark.parametrize("terms", [1, 3], ids=["tf32", "tf32x3"])
OPTIONS: dict[str, Any] = {"tasks": 2, "lr_scale": 0.02, "loss": LossSpec("mse"), "dtype": torch.float32}


def images(kind: Act = Act.RELU, needs: int = BOTH, **options: Any) -> InnerLoopArgs:
    return call_of(IMAGES, kind, needs, **OPTIONS | options)


def in_double(a: InnerLoopArgs) -> InnerLoopArgs:
    def double(value: Any) -> Any:
        if isinstance(value, list):
            return [double(each) for each in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return a._make(double(value) for value in a)


def errors(found: Results, exact: Results) -> list[float]:
    """Of outputs and of gradients, by their norms."""

    def error(ours: list[torch.Tensor], right: list[torch.Tensor]) -> float:
        x, y = (torch.cat([t.double().flatten() for t in group]) for group in (ours, right))
        return float((x - y).norm() / y.norm())

    return [error(*pair) for pair in zip(found, exact, strict=True)]


# --- errors -----------------------------------------------------------------------------------------------------------


@functools.cache
def of_seeds(kind: Act) -> dict[str, list[list[float]]]:
    """By who computes, of every seed the errors; K = 2, over whole tiles and a part of one."""
    found: dict[str, list[list[float]]] = {"pytorch": [], "tf32": [], "tf32x3": []}
    for seed in SEEDS:
        options = OPTIONS | {"support": (33, 19, 9)[seed % 3], "query": (9, 5)[seed % 2], "lr": "tensor"}
        draft = mlp(IMAGES, kind, CONSTANTS.get(kind))
        a = InnerLoopArgs.of_schema(problem(random.Random(seed), draft, **options).op_arguments(BOTH))
        exact = run(in_double(a), backend="reference")
        found["pytorch"].append(errors(run(a, backend="reference"), exact))
        for name, terms in (("tf32", 1), ("tf32x3", 3)):
            found[name].append(errors(run(a, HostKernels(terms=terms)), exact))
    return found


def ratios(kind: Act, form: str) -> list[float]:
    """Medians over the seeds: of outputs and of gradients, the error beside PyTorch's."""
    ours, theirs = torch.tensor(of_seeds(kind)[form]), torch.tensor(of_seeds(kind)["pytorch"])
    return [statistics.median(each.tolist()) for each in (ours / theirs).unbind(1)]


@every_kind
def test_three_products_for_one_have_float32s_error(kind: Act) -> None:
    assert max(ratios(kind, "tf32x3")) <= 2


@every_kind
def test_one_product_has_tf32s_error(kind: Act) -> None:
    """And not float32's: the bound above finds it. A number is rounded by at most 2^-11 of it, a product of two by
    2^-10; from the data to a gradient lead the forward and backward products of all steps and of the query set, and
    the tangents' of the way back, through two layers of whole fragments.
    """
    steps, layers = 2, 2
    in_a_row = layers * (2 * (steps + 1) + 2 * steps)
    assert max(max(each) for each in of_seeds(kind)["tf32"]) <= in_a_row * 2**-10
    assert min(ratios(kind, "tf32")) > 20


def test_numbers_are_rounded_to_the_nearest() -> None:
    """As the instruction of the chip does, but for halves, which go to even ones."""
    library, rng = tf32_library(), random.Random(0)
    for _ in range(2000):
        x = struct_of(rng.choice([-1, 1]) * rng.uniform(1, 2) * 2.0 ** rng.randint(-100, 100))
        assert library.rounded_to_tf32(x) == library.rounded_by_the_unit(x)
    for x, near in ((1 + 2**-11, 1.0), (1 + 3 * 2**-11, 1 + 2**-9), (0.0, 0.0), (-3.0, -3.0)):
        assert library.rounded_to_tf32(x) == near
    assert math.isnan(library.rounded_to_tf32(math.nan)) and math.isnan(library.rounded_to_tf32(math.inf))


def struct_of(x: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(x, dtype=torch.float32))


def test_second_order_is_another_gradient_than_first_order() -> None:
    options: dict[str, Any] = {"support": 19, "query": 10, "steps": 3, "needs": NEED_PARAMS}
    for first_order in (False, True):
        a = images(**options, first_order=first_order)
        found, exact = run(a, HostKernels(terms=3)), run(in_double(a), backend="reference")
        assert max(errors(found, exact)) < 1e-5
        other = run(in_double(images(**options, first_order=not first_order)), backend="reference")
        assert errors(found, other)[1] > 1e-2


# --- the same bits ----------------------------------------------------------------------------------------------------


@every_form
@every_kind
def test_bits_do_not_depend_on_the_launch(kind: Act, terms: int) -> None:
    a = images(kind, support=37, query=5, steps=1, lr="tensor")
    expected = run(a, HostKernels(terms=terms))
    for order in ORDERS:
        assert same_bits(run(a, HostKernels(order=order, terms=terms)), expected)
    for threads, blocks in ((32, 1), (96, 3), (256, 2)):
        assert same_bits(run(a, HostKernels(threads=threads, blocks=blocks, order=1, terms=terms)), expected)


@every_form
def test_a_task_gives_the_same_bits_in_any_batch(terms: int) -> None:
    a = images(tasks=4, support=37, query=35, steps=1)
    large = parts_of(a, HostKernels(multiprocessors=4, blocks=4, terms=terms))
    for group in ([3], [2, 0]):
        for ours, alone in zip(large, parts_of(some(a, group), HostKernels(terms=terms)), strict=True):
            assert torch.equal(ours[group], alone)


@every_form
def test_nan_stays_in_its_task(terms: int) -> None:
    a = images(tasks=3, support=37, query=5, steps=1)
    x = a.support_x[0].clone()
    x[1, 36, 0] = float("nan")
    clean, dirty = (parts_of(each, HostKernels(terms=terms)) for each in (a, a._replace(support_x=[x])))
    assert dirty[0].isnan().tolist() == [False, True, False]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_a_backward_without_a_carry_makes_it_again() -> None:
    """As in a registered op, which keeps none."""
    a = images(support=5, query=3, steps=1)
    with with_kernels(HostKernels(terms=3)) as kernels:
        backend = BACKENDS.named(CUDA_HOST)
        assert backend.forward is not None and backend.backward is not None
        loss, *_, carry = backend.forward(a)
        found = [backend.backward(torch.ones_like(loss), None, None, [], a, each)[0] for each in (carry, ())]
        assert kernels.launches == 2
    for ours, again in zip(*found, strict=True):
        assert torch.equal(ours, again)


def test_launches_overlap_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    a = images(support=5, query=3, steps=1)
    expected = run(a, HostKernels(terms=3))
    monkeypatch.setenv(OVERLAP, "1")
    bound = Perceptrons(HostKernels(terms=3), 3).bound(a)
    assert bound is not None and bound.launch.overlaps == 1
    assert same_bits(run(a, HostKernels(terms=3)), expected)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[InnerLoopArgs, str]] = {
    "other widths": (call_of([2, 64, 64, 3], dtype=torch.float32), "the widths are 2-64-64-3 .*2-64-64-64-3"),
    "masks": (images(masks=("some", "none")), "there are masks"),
    "classes": (images(loss=LossSpec("cross_entropy")), "a loss is not one of elements"),
    "kept parameters": (images(keep=1), "adapted parameters are handed out"),
    "rates of elements": (images(lr="element"), "elements of a tensor have rates of their own"),
    "rates of first order": (images(first_order=True), "gradients of rates are wanted of first order"),
    "no query set": (images(query=None), "there is no query set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_form_cannot_take_is_named(name: str) -> None:
    a, why = REFUSED[name]
    with with_kernels(HostKernels(terms=3)) as kernels:
        forward = BACKENDS.named(CUDA_HOST).forward
        assert forward is not None
        with pytest.raises(BackendUnavailable, match=f'got "{CUDA_HOST}" where .*{why}.* Use backend="cuda"'):
            forward(a)
        assert kernels.launches == 0


def test_other_cotangents_are_refused() -> None:
    a = images(support=3, query=3, steps=1)
    with with_kernels(HostKernels(terms=1)):
        backend = BACKENDS.named(CUDA_HOST)
        assert backend.forward is not None and backend.backward is not None
        loss, output, *_, carry = backend.forward(a)
        with pytest.raises(BackendUnavailable, match="what flows back is more than the losses' gradient"):
            backend.backward(torch.ones_like(loss), torch.ones_like(output), None, [], a, carry)


@pytest.mark.parametrize("form", ["cuda:tf32", "cuda:tf32x3"])
def test_float64_is_refused(form: str) -> None:
    backend = BACKENDS.named(form)
    assert backend.supports("cuda", torch.float32) is None
    assert backend.supports("cuda", torch.float64) == "it computes in float32, the parameters are torch.float64"
    assert "'cpu'" in str(backend.supports("cpu", torch.float32))
    assert form not in BACKENDS.names()  # never by itself


def test_a_launch_of_half_warps_is_refused() -> None:
    with pytest.raises(RuntimeError, match="32 to 256 threads in warps, got"):
        parts_of(images(support=3, query=3, steps=1), HostKernels(threads=48, terms=1))


def test_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(132, 227 * 1024, 228 * 1024)
    a = images(tasks=8, support=1024, query=1024, steps=3)
    for form, terms, how in (("cuda:tf32", 1, ""), ("cuda:tf32x3", 3, " by three products for one")):
        monkeypatch.setattr(describe, "DeviceKernels", lambda chip_of, tf32, terms=terms: HostKernels(terms=terms))
        said = str(describe.launch_of(a, chip, form))
        assert f"2-64-64-64-3 in TF32{how} by tiles of 32 samples, 14 launches" in said and "predicted" not in said
        said = str(describe.launch_of(a, chip, form, DEVICES["h200"]))
        assert said.endswith("; no time is predicted: the clocks of products on matrix units are not known")
        with pytest.raises(BackendUnavailable, match=f'"{form}" where a loss'):
            describe.launch_of(images(loss=LossSpec("cross_entropy")), chip, form)


def test_maml_knows_the_forms() -> None:
    maml = MAML(nn.Linear(2, 3), 0.01, loss="mse", backend="cuda:tf32x3")
    x, y = torch.randn(2, 5, 2), torch.randn(2, 5, 3)
    with pytest.raises(BackendUnavailable, match="cuda:tf32x3"):
        maml.meta_loss(x, y, x, y)
