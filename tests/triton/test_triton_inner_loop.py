"""The schedule in Triton: computed by Triton's interpreter, compiled for GPUs that are not here, its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from cases.triton_process import CAPABILITIES, MARKS, SHARED_KB, compiled_by, interpret
from schedule.test_schedule import workload

from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.call import Call, Part, Plane, Schedule
from mtml_kernels.schedule.kernels import KERNELS, Linear
from mtml_kernels.schema.inner_loop import InnerLoopArgs
from mtml_kernels.schema.update import UpdateSpec

pytest.importorskip("triton", reason="triton is required on Linux only")
from mtml_kernels.triton.inner_loop import bound
from mtml_kernels.triton.inner_loop.jobs import Job, Product, Space
from mtml_kernels.triton.inner_loop.launching import LaunchKernel
from mtml_kernels.triton.inner_loop.policy import depth_of_piece, programs, tile_of


def launched(a: InnerLoopArgs) -> list[str]:
    """The parts of a meta-step that are launches of their own, or several together."""
    plan = plan_of(a)
    trip = plan.trip(plan.usually)
    parts = [part.kernel for schedule in (trip.there, trip.back) for _, part, *_ in bound(schedule).steps]
    free = {name for name, kernel in KERNELS.items() if kernel.kind == "free"}
    return [part for part in parts if part not in free]


@pytest.mark.parametrize(
    "name, most",
    {"sinusoid": 72, "siren": 69, "omniglot_mlp": 40, "omniglot_conv": 100, "mini_conv": 376}.items(),
)
def test_launches_of_a_meta_step(name: str, most: int) -> None:
    """More than the schedule's calls by what puts shares of statistics and pieces of gradients together, and by parts
    that wait for it.
    """
    assert len(launched(workload(name))) <= most


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", ["omniglot_mlp", "omniglot_conv"])
def test_a_rule_is_a_launch_of_all_tensors(name: str, clipped: bool) -> None:
    """A step, and a step of the way back, have one more launch than gradient descent has, which goes along with
    products; clipping is a part of its own there and back.
    """
    plain, rule = workload(name, steps=2), UpdateSpec("adam", clipped=clipped)
    spec = dataclasses.replace(plain.spec, update=[*rule.encode(), 0])
    hyper = [torch.empty(8, dtype=torch.float64, device="meta")]
    launches = [launched(plain), launched(plain._replace(spec=spec, hyper=hyper))]
    assert launches[1].count("update.rule") == launches[1].count("update.adjoint") == 2
    assert len(launches[1]) <= len(launches[0]) + (8 if clipped else 4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rows, cols", [(5, 40), (75, 64), (14700, 64), (1, 1)])
def test_tiles_are_of_one_task(rows: int, cols: int, merged: bool) -> None:
    tiles = set()
    for tasks in (1, 2, 33):
        space = Space((tasks, rows, 1, cols), merged)
        tiles.add(tile_of(Job(space, 0, Product((), 64)), "tl.float32"))
    assert len(tiles) == 1


@pytest.mark.parametrize(
    "samples, points, turns", [(10, 1, [1]), (500, 1, [8, 8]), (1024, 1, [8] * 4), (75, 7056, [65] * 254 + [28])]
)
def test_pieces_of_a_gradient(samples: int, points: int, turns: list[int]) -> None:
    """By one task's shape: a program goes round 8 to some 64 times, and what has few rounds is not cut."""
    for tasks in (1, 4, 33):
        job = gradient_of(tasks, samples, points)
        assert job.product is not None
        span = depth_of_piece(samples * points, job.pieces, 32)
        starts = range(0, samples * points, span)
        assert [-(-min(span, samples * points - start) // 32) for start in starts] == turns
        assert programs(job, tile_of(job, "tl.float32")) == tasks * len(turns)


def gradient_of(tasks: int, samples: int, points: int) -> Job:
    """dw [T, 32, 64] of a linear layer."""
    shapes = ((tasks, samples, points, 32), "d"), ((tasks, samples, points, 64), "x"), ((tasks, 32, 64), "w")
    planes = [Plane(shape, torch.float32, name) for shape, name in (*shapes, ((tasks, 32, 64), "dw"))]
    part = Part("linear.backward", (0, 1, 2), (-1, 3, -1), Linear(False, False))
    kernel = bound(Schedule(tuple(planes), (Call((part,), "here"),), (3,))).steps[0][0]
    assert isinstance(kernel, LaunchKernel)
    return kernel.launch.jobs[0]


@pytest.mark.parametrize("marked", MARKS)
def test_through_the_interpreter(marked: str) -> None:
    interpret("inner_loop.py", marked)


def test_what_launches_fuse_through_the_interpreter() -> None:
    interpret("inner_loop_fused.py", "not slow")


def test_gradients_in_pieces_through_the_interpreter() -> None:
    interpret("inner_loop_pieces.py", "not slow")


def test_building_blocks_through_the_interpreter() -> None:
    interpret("task_layers.py", "not slow")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    kernels = compiled_by("inner_loop.py", capability, tmp_path)
    assert len(kernels) >= 20
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_KB[capability] * 1024, kernel
        if kernel["usage"] is not None:  # else this triton comes without cuobjdump
            assert kernel["usage"]["STACK"] <= 64 and kernel["usage"]["LOCAL"] == 0, kernel
        if kernel["precision"] == "ieee" and kernel["products"]:
            assert not kernel["mma"] and kernel["fma"], kernel
        if kernel["precision"] != "ieee" and kernel["products"]:
            assert kernel["mma"], kernel


@pytest.mark.parametrize("tasks, wide", [(2, False), (70_000, True)])
def test_indices_of_large_planes_have_64_bits(tasks: int, wide: bool) -> None:
    """70 000 tasks of 64 KB: what is shared by all has its rows in one matrix, what is not a matrix a task."""
    for shared in (1, tasks):
        planes = [Plane((tasks, 128, 1, 256), torch.float32, "x"), Plane((shared, 128, 256), torch.float32, "w")]
        planes.append(Plane((tasks, 128, 1, 128), torch.float32, "y"))
        part = Part("linear.forward", (0, 1, -1), (2,), Linear(False, False))
        (step,) = bound(Schedule(tuple(planes), (Call((part,), "here"),), (2,))).steps
        assert isinstance(step[0], LaunchKernel)
        text, _ = step[0].text([torch.empty(plane.shape, device="meta") for plane in planes])
        assert ("tl.int64" in text) == wide


@pytest.mark.parametrize("name", ["omniglot_mlp", "siren"])
def test_shares_of_sums_are_let_go_of(name: str) -> None:
    """After their one reader: those of sums over tasks are as large as the gradients of all tasks."""
    plan = plan_of(workload(name, steps=2))
    for schedule in plan.trip(plan.usually)[:2]:
        steps = bound(schedule).steps
        made = [plane for _, _, _, writes, _ in steps for plane in writes if plane >= len(schedule.planes)]
        dropped = [plane for *_, drops in steps for plane in drops if plane >= len(schedule.planes)]
        assert sorted(made) == sorted(dropped)
    assert made
