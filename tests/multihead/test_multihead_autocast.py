"""Several heads under autocast and in half precision: errors beside PyTorch's own, dtypes, weightings, balancing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
Targets = dict[str, Tensor]


def autocast(dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


class Model(nn.Module):
    def __init__(self, weighting: str = "sum") -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        kinds: Any = {"kind": mtml.Classification(3), "size": mtml.Regression(2), "marks": mtml.MultiLabel(4)}
        self.heads = mtml.MultiHead(16, kinds, weighting=weighting)

    def loss(self, x: Tensor, targets: Targets, **options: Any) -> Any:
        return self.heads.loss(self.trunk(x), targets, **options)

    def plain(self, x: Tensor, targets: Targets) -> Tensor:
        found = self.heads(self.trunk(x))
        losses = (
            F.cross_entropy(found["kind"], targets["kind"]),
            F.mse_loss(found["size"], targets["size"]),
            F.binary_cross_entropy_with_logits(found["marks"], targets["marks"]),
        )
        return torch.stack(losses).sum()


def batch(dtype: torch.dtype = F32) -> tuple[Tensor, Targets]:
    x, size, marks = torch.randn(12, 6), torch.randn(12, 2), torch.rand(12, 4)
    return x.to(dtype), {"kind": torch.randint(3, (12,)), "size": size.to(dtype), "marks": marks.to(dtype)}


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.double().flatten() for g in grads if g is not None])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_errors_beside_those_of_pytorch_under_autocast(dtype: torch.dtype) -> None:
    errors = []
    for seed in range(20):
        torch.manual_seed(seed)
        model, (x, targets) = Model(), batch()
        exact = copy.deepcopy(model).double()
        wide = {name: t.double() if t.is_floating_point() else t for name, t in targets.items()}
        want = gradient(exact.plain(x.double(), wide), exact)
        with autocast(dtype):
            losses = model.loss(x, targets)
            plain = model.plain(x, targets)
        assert {t.dtype for t in (losses.total, *losses.per_head.values())} == {F32}
        errors.append([error(gradient(losses.total, model), want), error(gradient(plain, model), want)])
    ours, theirs = torch.tensor(errors).median(0).values
    print(f"{dtype}: mtml {ours:.1e}, PyTorch {theirs:.1e}")
    assert ours <= 2 * theirs


@pytest.mark.parametrize("around", [nullcontext, autocast])
def test_heads_in_half_precision(around: Any) -> None:
    model, (x, targets) = Model().to(BF16), batch(BF16)
    exact = copy.deepcopy(model).double()
    want = gradient(
        exact.plain(x.double(), {n: t.double() if t.is_floating_point() else t for n, t in targets.items()}), exact
    )
    with around():
        losses = model.loss(x, targets)
    assert losses.per_head["kind"].dtype == (F32 if around is autocast else BF16)
    assert error(gradient(losses.total, model), want) < 2e-2


@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "gls", "rlw", "gradnorm"])
def test_weightings_under_autocast(weighting: str) -> None:
    model, (x, targets) = Model(weighting), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with autocast():
            losses = model.loss(x, targets)
        assert losses.total.dtype == F32
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_products_of_gradients_are_not_rounded() -> None:
    model, (x, targets) = Model(), batch()
    features = model.trunk(x)
    want = mtml.task_affinity(model.heads.loss(features, targets, separate=True))
    with autocast():
        inside = mtml.task_affinity(model.heads.loss(features, targets, separate=True))
    torch.testing.assert_close(inside, want, rtol=1e-5, atol=1e-6)


def test_grad_scaler_with_heads() -> None:
    def step(scaler: Any) -> list[Tensor]:
        torch.manual_seed(2)
        model, (x, targets) = Model("uncertainty"), batch()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with autocast():
            loss = model.loss(x, targets).total
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() for p in model.parameters()]

    scaled, plain = (step(torch.amp.GradScaler("cpu", init_scale=256.0, enabled=on)) for on in (True, False))
    torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-4)  # bfloat16 in the trunk, whose range is float32's
