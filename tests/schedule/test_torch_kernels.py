"""The `torch` provider as a whole: every row of the table, its shapes without data, its types in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases.schedule_kernels import close, part_of, run
from cases.schedule_samples import N, R, Sample, T, samples

from mtml_kernels.schedule.kernels import KERNELS, Linear
from mtml_kernels.schedule.torch_kernels import TORCH

# Results of sums, which are float32 beside planes of half precision.
SUMS = ("reduce", "loss.sum", "tasks.sum")
STATISTICS = ("mean", "rstd", "u1", "u2", "mt", "q", "u1t", "u2t")
WIDE = (*STATISTICS, "dw", "db", "dwt", "dbt", "each", "c", "total", "dc", "dmask")


def test_every_row_of_the_table_has_a_kernel_and_a_sample() -> None:
    assert TORCH.keys() == KERNELS.keys()
    assert {sample.name for sample in samples(torch.float32)} == KERNELS.keys()


def roles_of(sample: Sample) -> Sequence[str]:
    of_two = {"update.clip": ("scale", "y", "y"), "update.unclip": ("v", "v", "dhyper")}
    return of_two.get(sample.name, [role.removesuffix("*") for role in KERNELS[sample.name].writes])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_are_of_the_types_that_the_table_promises_and_the_same_without_data(dtype: torch.dtype) -> None:
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    fixed = {"index": torch.long, "dhyper": torch.float64}
    for sample in samples(dtype):
        part = part_of(*sample)
        results = TORCH[sample.name](part, *sample.operands)
        without = TORCH[sample.name](part, *(t if t is None else t.to("meta") for t in sample.operands))
        assert len(results) == len(part.writes), sample.name
        for role, wanted, real, meta in zip(roles_of(sample), part.wants, results, without, strict=True):
            assert (real is not None) == wanted, f"{sample.name}: {role}"
            if real is None:
                continue
            assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype, f"{sample.name}: {role}"
            summed = role in WIDE or sample.name in SUMS or sample.name.startswith("update")
            assert real.dtype == fixed.get(role, wide if summed else dtype), f"{sample.name}: {role} is {real.dtype}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    """Within a few roundings of the same operands in float64."""
    for sample in samples(dtype):
        exact = [t.double() if t is not None and t.is_floating_point() else t for t in sample.operands]
        mine = run(*sample[:2], *sample.operands, wants=part_of(*sample).wants)
        right = run(*sample[:2], *exact, wants=part_of(*sample).wants)
        for got, expected in zip(mine, right, strict=True):
            if got is not None and got.is_floating_point():
                room = float(expected.abs().max()) + 1
                assert (got.double() - expected).abs().max() < 40 * torch.finfo(dtype).eps * room, sample.name


def test_shared_tensors_may_be_half() -> None:
    """A weight of all tasks may still be as the caller gave it; what becomes of it is not."""
    theta, g = torch.randn(1, 4, 5).bfloat16(), torch.randn(T, 4, 5)
    assert run("update.step", None, theta, g, torch.tensor(0.1))[0].dtype == torch.float32
    x = torch.randn(T, N, R, 5).bfloat16()
    y = run("linear.forward", Linear(False, False), x, theta, None)[0]
    close(y.float(), (x @ theta[0].T).float(), tolerance=0.1)


def test_operands_may_lie_anywhere() -> None:
    """Views of any strides give what their copies give."""
    for sample in samples(torch.float64):
        moved = [t if t is None else torch.stack([t, t], -1)[..., 0] for t in sample.operands]
        right = run(*sample[:2], *sample.operands, wants=part_of(*sample).wants)
        for got, expected in zip(run(*sample[:2], *moved, wants=part_of(*sample).wants), right, strict=True):
            if got is not None:
                close(got, expected, sample.name)
