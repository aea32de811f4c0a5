"""The kernels of perceptrons of known widths, run on the CPU: equal to the reference, whatever the launch."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import statistics
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases.cuda_engine import CUDA_HOST
from cases.cuda_host import ORDERS
from cases.cuda_mlp import HostKernels, assert_equal, call_of, library, parts_of, run, some, with_kernels
from cases.engine import Evaluated, converted, draft_case, evaluate, mlp, problem, same_bits
from cases.inner_loop import Case
from torch import Tensor

from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall
from mtml_kernels.cuda.inner_loop.mlp_form import form_of
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import Act
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec

SINUSOID, POLICY = [1, 40, 40, 1], [2, 100, 100, 2]
STRAIGHT, BENT = (Act.RELU, Act.LEAKY_RELU), (Act.TANH, Act.SIN, Act.SIGMOID, Act.SOFTPLUS)
OF_ELEMENTS = (LossSpec("mse"), LossSpec("huber", delta=0.4), LossSpec("l1"), LossSpec("bce_with_logits"))


def random_options(rng: random.Random) -> dict[str, Any]:
    loss, steps = rng.choice(OF_ELEMENTS), rng.choice([0, 1, 2, 5])
    rates = rng.choice(["all", "tensor", "all_per_step", "tensor_per_step"]) if steps else "all"
    return {
        "tasks": rng.choice([1, 2, 3]),
        "support": rng.choice([1, 2, 5, 10, 13]),
        "query": rng.choice([1, 3, 10, 14]),
        "steps": steps,
        "loss": dataclasses.replace(loss, reduction=rng.choice(["mean", "sum"])),
        "query_loss": rng.choice(OF_ELEMENTS),
        "lr": rates,
        "lr_scale": 0.02,
    }


# --- equal to the reference -------------------------------------------------------------------------------------------


def test_the_call_has_one_layout() -> None:
    assert library().mlp_call_bytes() == ctypes.sizeof(MlpCall)


@pytest.mark.parametrize("kinds", [STRAIGHT, BENT], ids=["straight", "bent"])
def test_random_calls(kinds: Sequence[Act]) -> None:
    for seed in range(24):
        rng = random.Random(seed)
        needs, options = rng.choice([NEED_PARAMS, NEED_LR, NEED_PARAMS | NEED_LR]), random_options(rng)
        options["first_order"] = needs == NEED_PARAMS and seed % 4 == 0
        a = call_of(SINUSOID, rng.choice(kinds), needs, **options)
        assert_equal(run(a, HostKernels(rows=seed % 2, sets=1 + seed % 2)), run(a, backend="reference"))


@pytest.mark.parametrize("kind", [Act.RELU, Act.TANH])
def test_policies(kind: Act) -> None:
    for steps, rows in ((1, 0), (2, 1)):
        a = call_of(POLICY, kind, support=3, query=2, steps=steps, lr="tensor")
        assert_equal(run(a, HostKernels(rows=rows)), run(a, backend="reference"))


def test_no_gradients_and_no_loss_of_second_order() -> None:
    """Without `needs` nothing is kept; of first order the way back is not gone: another gradient than the second's."""
    a = call_of(SINUSOID, support=10, query=10, steps=3)
    with with_kernels() as kernels:
        forward = BACKENDS.named(CUDA_HOST).forward
        assert forward is not None
        *outputs, _, carry = forward(a._replace(needs=0))
        assert kernels.launches == 1 and not carry
    exact, first = run(a), run(call_of(SINUSOID, support=10, query=10, steps=3, first_order=True, needs=NEED_PARAMS))
    assert same_bits((list(outputs), []), (exact[0], []))
    assert max(float((x - y).norm() / x.norm()) for x, y in zip(exact[1][:6], first[1][:6], strict=True)) > 1e-2


def test_float32_errors_are_at_most_twice_pytorchs() -> None:
    ratios = []
    for seed in range(12):
        kind = (Act.RELU, Act.TANH)[seed % 2]
        case = problem(random.Random(seed), mlp(SINUSOID, kind), dtype=torch.float32, support=10, query=10, steps=3)
        exact, theirs = evaluated(converted(case, torch.float64), "reference"), evaluated(case, "reference")
        with with_kernels() as kernels:
            ours = evaluated(case, CUDA_HOST)
            assert kernels.launches == 1
        ratios.append([error(a, c) / error(b, c) for a, b, c in zip(ours, theirs, exact, strict=True)])
    for group in zip(*ratios, strict=True):
        assert statistics.median(group) <= 2


def evaluated(case: Case, backend: str) -> Evaluated:
    one = torch.ones(len(case.support_y), dtype=case.support_y.dtype)
    return evaluate(case, backend, [one, None, None], ["params", "lr"])


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    ours, right = (torch.cat([t.double().flatten() for t in group]) for group in (found, exact))
    return float((ours - right).norm() / right.norm())


# --- the same bits ----------------------------------------------------------------------------------------------------

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@every_dtype
@pytest.mark.parametrize("kind", [Act.RELU, Act.TANH])
def test_bits_do_not_depend_on_the_launch(kind: Act, dtype: torch.dtype) -> None:
    a = call_of(SINUSOID, kind, tasks=3, support=10, query=11, steps=2, lr="tensor", dtype=dtype)
    expected = run(a)
    for order in ORDERS:
        assert same_bits(run(a, HostKernels(order=order)), expected)
    for rows, threads, blocks, sets in ((0, 32, 1, 1), (0, 96, 3, 2), (1, 32, 2, 1), (1, 64, 1, 2), (0, 256, 2, 2)):
        kernels = HostKernels(rows=rows, threads=threads, blocks=blocks, sets=sets, order=1)
        assert same_bits(run(a, kernels), expected)


@every_dtype
def test_a_task_gives_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    a = call_of(SINUSOID, tasks=25, support=10, query=10, steps=2, dtype=dtype)
    for multiprocessors in (132, 4):  # few tasks, many
        large = parts_of(a, HostKernels(multiprocessors=multiprocessors, blocks=4))
        for task in (0, 11, 24):
            for group in ([task], [3, task, 7]):
                at = group.index(task)
                for ours, alone in zip(large, parts_of(some(a, group), HostKernels()), strict=True):
                    assert torch.equal(ours[task], alone[at])


def test_nan_stays_in_its_task() -> None:
    """One block takes all tasks in turn."""
    a = call_of(SINUSOID, tasks=4, support=10, query=10, steps=2)
    x = a.support_x[0].clone()
    x[1, 0, 0] = float("nan")
    clean, dirty = (parts_of(each, HostKernels(blocks=1)) for each in (a, a._replace(support_x=[x])))
    assert dirty[0].isnan().tolist() == [False, True, False, False]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


# --- what the program of a block does instead -------------------------------------------------------------------------

OTHERS: dict[str, InnerLoopArgs] = {
    "other widths": call_of([1, 40, 41, 1]),
    "fewer layers": call_of([1, 40, 1]),
    "masks": call_of(SINUSOID, masks=("some", "none")),
    "classes": call_of(POLICY, loss=LossSpec("cross_entropy"), support=3),
    "rates of elements": call_of(SINUSOID, lr="element"),
    "weights of steps": call_of(SINUSOID, step_weights=True),
    "kept parameters": call_of(SINUSOID, keep=1),
    "rates of first order": call_of(SINUSOID, first_order=True),
    "no query set": call_of(SINUSOID, query=None),
    "a head over many features": call_of(
        [1600, 5], loss=LossSpec("cross_entropy"), tasks=2, support=3, query=2, steps=2
    ),
    "a slope below 0": InnerLoopArgs.of_schema(
        draft_case(mlp(SINUSOID, Act.LEAKY_RELU, (-0.2, 0.0))).op_arguments(NEED_PARAMS)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_go_to_the_program(name: str) -> None:
    a = OTHERS[name]
    with with_kernels() as kernels:
        backend = BACKENDS.named(CUDA_HOST)
        assert backend.forward is not None
        found = backend.forward(a)
        assert kernels.launches == 0
    reference = BACKENDS.named("reference").forward
    assert reference is not None
    for ours, right in zip(found[:3], reference(a)[:3], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_momentum_goes_to_the_program() -> None:
    a = call_of(SINUSOID)
    spec = dataclasses.replace(a.spec, update=[*UpdateSpec("sgd", momentum=True).encode(), 0])
    assert form_of(a) is not None and form_of(a._replace(spec=spec)) is None


def test_other_cotangents_go_to_the_program() -> None:
    """What is wanted of outputs and losses of steps, after a forward by the perceptron's kernel."""
    a = call_of(SINUSOID, support=4, query=3, steps=2)
    with with_kernels() as kernels:
        found = grads_of(a, CUDA_HOST)
        assert kernels.launches == 1
        for ours, right in zip(found, grads_of(a, "reference"), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def grads_of(a: InnerLoopArgs, name: str) -> list[Tensor]:
    backend = BACKENDS.named(name)
    assert backend.forward is not None and backend.backward is not None
    loss, output, support_losses, _, carry = backend.forward(a)
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in (loss, output, support_losses)]
    params, lr, *_ = backend.backward(*cotangents, [], a, carry)
    return [g for g in (*params, *lr) if g is not None]


def test_what_has_no_kernel_is_remembered_by_a_spec_that_stays() -> None:
    """Else another spec may get its id, and the answer."""
    a = OTHERS["rates of elements"]
    perceptrons, spec = Perceptrons(HostKernels()), dataclasses.replace(a.spec)
    seen = weakref.ref(spec)
    assert perceptrons.bound(a._replace(spec=spec)) is None
    del spec
    gc.collect()
    assert seen() is not None
