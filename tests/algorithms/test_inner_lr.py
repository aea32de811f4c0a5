"""mtml.InnerLR and mtml.MetaSGD."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from torch import nn

from mtml import MAML, InnerLR, MetaSGD
from mtml_kernels.ops.inner_loop import BACKENDS

every_path = pytest.mark.parametrize("backend", ["general", *BACKENDS.available()])
every_granularity = pytest.mark.parametrize("per", ["all", "tensor", "element"])


@every_path
@every_granularity
@pytest.mark.parametrize("steps", [None, 2, 4])
def test_rates_and_their_gradients(backend: str, per: str, steps: int | None) -> None:
    model, batch = mlp(3, 6, 2), regression()
    lr = InnerLR(model, 0.1, per=per, steps=steps)
    with torch.no_grad():
        for rate in lr.parameters():
            rate.mul_(torch.rand_like(rate) + 0.5)
    maml = MAML(model, lr, steps=2, loss="mse", backend=backend)
    assert len(list(maml.parameters())) == 4 + {"all": 1, "tensor": 4, "element": 4}[per]
    table = lr.as_dict()
    want = oracle(model, batch, F.mse_loss, lambda n, k: table[n] if steps is None else table[n][k], 2).loss
    got = maml.meta_loss(*batch)
    assert_same(got, want)
    assert_same(gradients(got, list(maml.parameters())), gradients(want, list(maml.parameters())))


@every_path
def test_bounds_apply_when_read(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    lr = InnerLR(model, 0.5, per="tensor", min=0.01, max=0.2)
    maml = MAML(model, lr, steps=2, loss="mse", backend=backend)
    loss = maml.meta_loss(*batch)
    assert_same(loss, oracle(model, batch, F.mse_loss, 0.2, 2).loss)
    assert all(rate.item() == 0.5 for rate in lr.parameters())
    loss.sum().backward()
    assert all(rate.grad is None or not rate.grad.any() for rate in lr.parameters())


@every_granularity
def test_state_dict(per: str) -> None:
    model = mlp(3, 6, 2)
    lr, other = (InnerLR(model, init, per=per, steps=3) for init in (0.1, 0.7))
    other.load_state_dict(lr.state_dict())
    for a, b in zip(lr.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    maml = MAML(model, lr, steps=3)
    assert [key.split(".")[0] for key in maml.state_dict()] == ["module"] * 4 + ["lr"] * len(lr.rates)
    assert_same(copy.deepcopy(maml).lr.as_dict()["0.bias"], lr.as_dict()["0.bias"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        InnerLR(model, per=per, steps=4).load_state_dict(lr.state_dict())


def test_forms() -> None:
    model = mlp(3, 6, 2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for per, form in (("all", lambda s: ()), ("tensor", lambda s: ()), ("element", lambda s: s)):
        assert {n: tuple(r.shape) for n, r in InnerLR(model, per=per).as_dict().items()} == {
            n: form(s) for n, s in shapes.items()
        }
    assert tuple(InnerLR(model, per="element", steps=5).as_dict()["0.weight"].shape) == (5, 6, 3)
    # what it gives is what MAML takes
    batch = regression()
    for lr in (
        InnerLR(model, 0.1, per="tensor", steps=2),
        InnerLR(model, 0.1, per="element", steps=2),
        InnerLR(model, 0.1),
    ):
        assert_same(
            MAML(model, lr.as_dict(), steps=2, loss="mse").meta_loss(*batch),
            MAML(model, lr, steps=2, loss="mse").meta_loss(*batch),
        )


def test_learnable_or_not_and_dtypes() -> None:
    model = mlp(3, 6, 2)
    fixed = InnerLR(model, 0.1, per="tensor", learnable=False)
    assert not any(rate.requires_grad for rate in fixed.parameters())
    assert all(rate.dtype == torch.float64 for rate in fixed.parameters())
    batch = regression()
    single = InnerLR(mlp(3, 6, 2).float(), 0.1)
    assert_same(
        MAML(model, single, loss="mse").meta_loss(*batch), MAML(model, fixed, loss="mse").meta_loss(*batch), rtol=1e-6
    )


def test_errors() -> None:
    model, batch = mlp(3, 6, 2), regression()
    for wrong, text in (
        ({"per": "layer"}, "per: expected one of"),
        ({"init": float("nan")}, "init: expected finite"),
        ({"steps": 0}, "steps: expected None or at least 1"),
        ({"min": 1.0, "max": 0.5}, "min: expected at most max=0.5"),
    ):
        with pytest.raises(ValueError, match=text):
            InnerLR(model, **wrong)  # type: ignore[arg-type]
    for backend in ("general", "auto"):
        with pytest.raises(ValueError, match=r"steps=3 rates, got InnerLR\(steps=2\)"):
            MAML(model, InnerLR(model, steps=2), steps=3, loss="mse", backend=backend).meta_loss(*batch)
        with pytest.raises(ValueError, match=r"got none for '0.weight', '0.bias'"):
            MAML(model, InnerLR(model, per="tensor", params="2.*"), loss="mse", backend=backend).meta_loss(*batch)
        lr = InnerLR(model, per="element")
        maml = MAML(model, lr, loss="mse", backend=backend)
        maml.meta_loss(*batch)
        with torch.no_grad():
            lr.rates[2][0, 1, 1] = float("inf")
        with pytest.raises(ValueError, match="lr: expected finite rates, got inf"):
            maml.meta_loss(*batch)


def test_frozen_parameters_have_rates_and_buffers_where_named() -> None:
    model = nn.Module()
    model.code = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.register_buffer("other", torch.zeros(2))
    model.norm = nn.BatchNorm1d(2)
    assert list(InnerLR(model, per="tensor").shapes) == ["code", "norm.weight", "norm.bias"]
    assert list(InnerLR(model, per="tensor", params=["code", "other"]).shapes) == ["code", "other"]


@every_path
def test_meta_sgd(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    sgd = MetaSGD(model, 0.1, steps=2, loss="mse", backend=backend)
    assert len(list(sgd.parameters())) == 2 * len(list(model.parameters()))
    assert [rate.shape for rate in sgd.lrs] == [p.shape for p in model.parameters()]
    want = oracle(model, batch, F.mse_loss, 0.1, 2).loss
    got = sgd.meta_loss(*batch)
    assert_same(got, want)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in sgd.parameters())
    learner = sgd.clone()
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    assert_same(F.mse_loss(learner(batch[2][0]), batch[3][0]), want[0])
    assert isinstance(learner, MetaSGD)
