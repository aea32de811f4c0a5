"""The kernels of perceptrons whose tasks are cut into tiles of samples, run on the CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases.cuda_engine import CUDA_HOST
from cases.cuda_host import ORDERS
from cases.cuda_mlp import HostKernels, assert_equal, call_of, parts_of, run, some, with_kernels
from cases.engine import same_bits
from torch import nn

from mtml import MAML
from mtml_kernels.cuda.inner_loop import describe
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.mlp import OVERLAP, Perceptrons, tile_blocks
from mtml_kernels.losses import LossSpec
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import Act
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs

IMAGES = [2, 64, 64, 64, 3]
every_kind = pytest.mark.parametrize("kind", [Act.RELU, Act.SIN], ids=["straight", "bent"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def images(kind: Act = Act.RELU, needs: int = NEED_PARAMS | NEED_LR, **options: Any) -> InnerLoopArgs:
    return call_of(IMAGES, kind, needs, **{"tasks": 2, "lr_scale": 0.02, "loss": LossSpec("mse")} | options)


# --- equal to the reference -------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    ("support", "query", "steps", "rates"),
    [
        (1, 33, 3, "tensor"),
        (31, 1, 1, "all"),
        (32, 31, 2, "all_per_step"),
        (33, 32, 2, "tensor_per_step"),
        (70, 5, 2, "tensor_per_step"),
    ],
)
def test_equal_to_the_reference(kind: Act, support: int, query: int, steps: int, rates: str) -> None:
    rng = random.Random(support)
    losses = [LossSpec(name, reduction=rng.choice(["mean", "sum"])) for name in ("mse", "l1", "bce_with_logits")]
    a = images(
        kind,
        support=support,
        query=query,
        steps=steps,
        lr=rates,
        loss=rng.choice(losses),
        query_loss=rng.choice(losses),
    )
    assert_equal(run(a), run(a, backend="reference"))


@every_kind
@pytest.mark.parametrize("needs", [NEED_PARAMS, NEED_LR])
def test_no_steps_and_some_gradients(kind: Act, needs: int) -> None:
    for steps in (0, 1):
        a = images(kind, needs, support=33, query=9, steps=steps)
        assert_equal(run(a), run(a, backend="reference"))


@pytest.mark.parametrize("act", [Act.LEAKY_RELU, Act.TANH, Act.SOFTPLUS])
def test_other_activations(act: Act) -> None:
    a = images(act, support=9, query=17, steps=2, lr="tensor")
    assert_equal(run(a), run(a, backend="reference"))


def test_no_gradients_and_no_loss_of_second_order() -> None:
    """Of first order the way back is not gone: another gradient than the second's. Both are the reference's."""
    a = images(support=40, query=10, steps=3)
    with with_kernels() as kernels:
        forward = BACKENDS.named(CUDA_HOST).forward
        assert forward is not None
        *outputs, _, carry = forward(a._replace(needs=0))
        assert kernels.launches == 1 and not carry
    exact, first = run(a), images(needs=NEED_PARAMS, support=40, query=10, steps=3, first_order=True)
    assert same_bits((list(outputs), []), (exact[0], []))
    found = run(first)
    assert_equal(found, run(first, backend="reference"))
    assert max(float((x - y).norm() / x.norm()) for x, y in zip(exact[1][:8], found[1][:8], strict=True)) > 1e-2


@every_kind
def test_float32_errors_are_at_most_twice_pytorchs(kind: Act) -> None:
    """Over whole tiles of the float32 kernel, and a part of one."""
    ours, theirs = 0.0, 0.0
    for support in (70, 64, 33, 32):
        a = images(kind, support=support, query=40, steps=2, lr="tensor", dtype=torch.float32)
        exact, found, pytorch = run(in_double(a), backend="reference"), run(a), run(a, backend="reference")
        ours += error(found[1], exact[1])
        theirs += error(pytorch[1], exact[1])
    assert ours <= 2 * theirs


def in_double(a: InnerLoopArgs) -> InnerLoopArgs:
    def double(value: Any) -> Any:
        if isinstance(value, list):
            return [double(each) for each in value]
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return a._make(double(value) for value in a)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    ours, right = (torch.cat([t.double().flatten() for t in group]) for group in (found, exact))
    return float((ours - right).norm() / right.norm())


# --- the same bits ----------------------------------------------------------------------------------------------------


@every_dtype
@every_kind
def test_bits_do_not_depend_on_the_launch(kind: Act, dtype: torch.dtype) -> None:
    a = images(kind, support=37, query=5, steps=2, lr="tensor", dtype=dtype)
    expected = run(a)
    for order in ORDERS:
        assert same_bits(run(a, HostKernels(order=order)), expected)
    for threads, blocks in ((32, 1), (96, 3), (256, 2)):
        assert same_bits(run(a, HostKernels(threads=threads, blocks=blocks, order=1)), expected)


@every_dtype
def test_a_task_gives_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    a = images(tasks=5, support=37, query=35, steps=1, dtype=dtype)
    large = parts_of(a, HostKernels(multiprocessors=4, blocks=4))
    for group in ([4], [3, 0, 2]):
        for ours, alone in zip(large, parts_of(some(a, group), HostKernels()), strict=True):
            assert torch.equal(ours[group], alone)


def test_nan_stays_in_its_task() -> None:
    a = images(tasks=3, support=37, query=5, steps=1)
    x = a.support_x[0].clone()
    x[1, 36, 0] = float("nan")
    clean, dirty = (parts_of(each, HostKernels()) for each in (a, a._replace(support_x=[x])))
    assert dirty[0].isnan().tolist() == [False, True, False]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "tiles", "blocks"),
    [(8, 32, 16), (1, 32, 32), (132, 32, 1), (1000, 2, 1), (40, 7, 3), (3, 1, 1)],
)
def test_blocks_of_the_way_back(tasks: int, tiles: int, blocks: int) -> None:
    """On 132 multiprocessors that hold one each; seven tiles by three blocks are 3, 3 and 1."""
    assert tile_blocks(Chip(132, 227 * 1024, 228 * 1024), tasks, tiles, 180 * 1024) == blocks


def test_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "DeviceKernels", lambda chip_of, tf32: HostKernels())
    chip = Chip(132, 227 * 1024, 228 * 1024)
    for needs, launches in ((NEED_PARAMS, 14), (0, 8)):
        a = images(needs=needs, tasks=8, support=1024, query=1024, steps=3, dtype=torch.float32)
        said = str(describe.launch_of(a, chip))
        assert f"2-64-64-64-3 by tiles of 32 samples, {launches} launches; the largest of" in said
    layers = [layer for i, o in ((2, 64), (64, 64), (64, 64)) for layer in (nn.Linear(i, o), nn.ReLU())]
    x, y = torch.randn(2, 5, 2), torch.randn(2, 5, 3)
    maml = MAML(nn.Sequential(*layers, nn.Linear(64, 3)), 0.01, loss="mse", backend="torch")
    kernels = "the kernels of perceptrons 2-64-64-64-3 by tiles of 32 samples"
    assert maml.explain(x, y, x, y).launch.startswith(f"by backend='cuda' some for each step, on an H200: {kernels}")


def test_launches_overlap_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    a = images(support=33, query=5, steps=1, dtype=torch.float32)
    expected, perceptrons = run(a), Perceptrons(HostKernels())
    for asked, overlaps in (("1", 1), ("0", 0), ("", 0)):
        monkeypatch.setenv(OVERLAP, asked)
        bound = perceptrons.bound(a)
        assert bound is not None and bound.launch.overlaps == overlaps
        assert same_bits(run(a), expected)
    monkeypatch.setenv(OVERLAP, "yes")
    with pytest.raises(ValueError, match="MTML_CUDA_OVERLAP: expected 0 or 1, got 'yes'"):
        run(a)


def test_a_launch_of_half_warps_is_refused() -> None:
    a = images(support=3, query=3, steps=1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="32 to 256 threads in warps, got"):
        parts_of(a, HostKernels(threads=48))


def test_other_calls_go_to_the_program() -> None:
    """What the kernels of a block a task leave to the program, these do too."""
    for a in (images(masks=("some", "none"), support=5, query=3), images(step_weights=True, support=5, query=3)):
        with with_kernels() as kernels:
            forward = BACKENDS.named(CUDA_HOST).forward
            assert forward is not None
            forward(a)
            assert kernels.launches == 0
