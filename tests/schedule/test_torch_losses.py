"""Losses and weights of samples of the `torch` provider against torch.func of `losses.task_loss` in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases.engine import LOSSES
from cases.schedule_kernels import close, presence, run, scattered
from torch import Tensor

from mtml_kernels.losses import LossSpec
from mtml_kernels.losses.task import task_loss
from mtml_kernels.schedule.kernels import Loss

T, N = 3, 4
SOFT = [dataclasses.replace(spec, soft=True) for spec in LOSSES if spec.info.ids]


def case(spec: LossSpec, ignored: bool = False) -> tuple[Loss, Tensor, Tensor]:
    """(constants, z [T, N, R, F], target)"""
    kind, reduction, p0 = spec.encode()
    given = Loss(kind, p0, reduction == 1, torch.float64)
    z = scattered(T, N, 1, 5) if spec.info.classes else scattered(T, N, 2, 3)
    if not spec.info.ids:
        return given, z, scattered(T, N, 6) if spec.kind == "mse" else scattered(T, N, 2, 3)
    if spec.soft:
        return given, z, scattered(T, N, 5).abs()
    target = torch.randint(0, 5, (T, N))
    if ignored:
        target[0, 1] = target[1] = -100
    return given, z, target


def reference(spec: LossSpec, like: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(z, target, mask) -> losses [T]"""

    def f(z: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        output = z.flatten(2)
        target = target.reshape(T, N) if not target.is_floating_point() else target.reshape(output.shape)
        each = [task_loss(spec, output[t], target[t], None if mask is None else mask[t]) for t in range(T)]
        return torch.stack(each)

    return f


def weights(given: Loss, mask: Tensor | None, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    ids = None if target.is_floating_point() else target
    if mask is None and ids is None:
        return None, None
    c, total = run("weights.forward", given, mask, ids, wants=(True, not given.total))
    return c, total


def some_mask() -> Tensor:
    mask = torch.rand(T, N, dtype=torch.float64)
    mask[0, 0] = 0
    mask[2] = 0
    return mask


@pytest.mark.parametrize("spec", [*LOSSES, *SOFT], ids=lambda spec: f"{spec}{'soft' * spec.soft}")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss(spec: LossSpec, masked: bool, ignored: bool) -> None:
    if ignored and (spec.soft or not spec.info.ids):
        return
    given, z, target = case(spec, ignored)
    mask = some_mask() if masked else None
    f = reference(spec, z)
    c, _ = weights(given, mask, target)
    each, d = run("loss.forward", given, z, target, c)
    close(run("loss.sum", given, each, c)[0], f(z, target, mask), "loss")
    gradient = torch.func.grad(lambda z: f(z, target, mask).sum())
    close(d, gradient(z), "d")
    zt, seed = scattered(*z.shape), torch.randn(T, dtype=z.dtype)
    bent = torch.func.jvp(gradient, (z,), (zt,))[1]
    for moved, seeded in presence(zt, seed):
        expected = (bent if moved is not None else 0) + (0 if seeded is None else seed.view(T, 1, 1, 1) * d)
        close(run("loss.tangent", given, z, moved, target, c, seeded)[0], expected, "dt")


@pytest.mark.parametrize("spec", [*LOSSES, *SOFT], ids=lambda spec: f"{spec}{'soft' * spec.soft}")
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_targets_and_masks(spec: LossSpec, masked: bool) -> None:
    given, z, target = case(spec, ignored=True)
    mask = some_mask() if masked else None
    f, ids = reference(spec, z), not target.is_floating_point()
    c, total = weights(given, mask, target)
    zt, seed = scattered(*z.shape), torch.randn(T, dtype=z.dtype)
    ones = torch.ones(T, N, dtype=z.dtype)
    at = target.double() if ids else target

    def gradients(z: Tensor, at: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        whole = lambda y, m: (seed * f(z, target if ids else y, m)).sum()  # noqa: E731
        return torch.func.grad(whole, (0, 1))(at, ones if mask is None else mask)

    for moved, seeded in presence(zt, seed):
        own = gradients(z, at, torch.zeros_like(seed) if seeded is None else seeded)
        along = torch.func.jvp(lambda z: gradients(z, at, torch.ones_like(seed)), (z,), (zt,))[1]
        expected = [a + b if moved is not None else a for a, b in zip(own, along, strict=True)]
        dtarget, dc = run("loss.data", given, z, moved, target, c, seeded, wants=(not ids, masked))
        if not ids:
            close(dtarget, expected[0], "dtarget")
        if masked:
            (dmask,) = run("weights.backward", given, dc, c, total, target if ids else None)
            close(dmask, expected[1], "dmask")


def test_an_ignored_id_indexes_nothing() -> None:
    given = Loss(LossSpec("cross_entropy").encode()[0], 0.0, False)
    z, target = torch.randn(1, 2, 1, 3), torch.tensor([[-100, 1]])
    c, total = run("weights.forward", given, None, target)
    assert c.tolist() == [[0.0, 1.0]] and total.tolist() == [1.0]
    _, d = run("loss.forward", given, z, target, c)
    assert not d[0, 0].any() and d[0, 1].any()


def test_nan_stays_in_its_task() -> None:
    given = Loss(LossSpec("huber").encode()[0], 1.0, False)
    z = torch.zeros(2, 3, 1, 1)
    z[0, 1] = float("nan")
    each, d = run("loss.forward", given, z, torch.ones(2, 3, 1), None)
    assert each.isnan().tolist() == [[False, True, False], [False] * 3]
    assert d.isnan().sum() == 1
