"""One task at a time: the clone, adapt, forward loop that learn2learn made common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from torch import Tensor, nn

import mtml
from mtml import MAML


def test_the_loop_equals_the_batch() -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=3, loss="mse")
    want = maml.meta_loss(*batch)
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(F.mse_loss(learner(sx), sy))
        losses.append(F.mse_loss(learner(qx), qy))
    got = torch.stack(losses)
    assert_same(got, want)
    assert_same(gradients(got, list(model.parameters())), gradients(want, list(model.parameters())))


@pytest.mark.parametrize("per", ["all", "tensor", "element"])
def test_the_loop_with_rates_per_step(per: str) -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    lr = mtml.InnerLR(model, 0.1, per=per, steps=2)
    with torch.no_grad():
        for rate in lr.parameters():
            rate[1] *= 2
    maml = MAML(model, lr, steps=2, loss="mse")
    learner = maml.clone()
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    got, want = F.mse_loss(learner(batch[2][0]), batch[3][0]).reshape(1), maml.meta_loss(*batch)
    assert_same(got, want)
    assert_same(gradients(got, list(maml.parameters())), gradients(want, list(maml.parameters())))
    with pytest.raises(ValueError, match="expected at least steps=3 rates"):
        learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))


def test_the_loop_with_an_update_rule() -> None:
    def heavy_ball(params: Any, grads: Any, lr: Any, step: int, state: Any) -> Any:
        speed = grads if state is None else {n: 0.9 * state[n] + g for n, g in grads.items()}
        return {n: p - lr[n] * speed[n] for n, p in params.items()}, speed

    model, batch = mlp(3, 6, 2), regression(1)
    maml = MAML(model, 0.1, steps=3, loss="mse", update=heavy_ball, backend="general")
    learner = maml.clone()
    for _ in range(3):
        learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    assert_same(F.mse_loss(learner(batch[2][0]), batch[3][0]).reshape(1), maml.meta_loss(*batch))


def test_first_order_clone() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    learner = MAML(model, 0.1, loss="mse").clone(first_order=True)
    assert learner.first_order
    learner.adapt(F.mse_loss(learner(batch[0][0]), batch[1][0]))
    loss = F.mse_loss(learner(batch[2][0]), batch[3][0]).reshape(1)
    want = oracle(model, batch, F.mse_loss, 0.1, 1, first_order=True).loss
    assert_same(gradients(loss, list(model.parameters())), gradients(want, list(model.parameters())))


def test_gradients_arrive_in_the_original() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    maml = MAML(model, 0.1)
    clone = maml.clone()
    for a, b in zip(maml.parameters(), clone.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and not b.is_leaf
    sum(p.norm() for p in clone.parameters()).backward()
    assert all(p.grad is not None for p in model.parameters())
    values = [p.detach().clone() for p in model.parameters()]
    clone = maml.clone()
    clone.adapt(F.mse_loss(clone(batch[0][0]), batch[1][0]))
    assert_same([p.detach() for p in model.parameters()], values)
    assert clone.module is not model and maml.module is model


def test_unused_and_frozen_parameters() -> None:
    model, batch = mlp(3, 6, 2), regression(1)
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    maml = MAML(model, 0.1)
    learner = maml.clone()
    loss = F.mse_loss(learner(batch[0][0]), batch[1][0])
    with pytest.raises(RuntimeError, match="does not depend on these parameters: 'spare'; pass allow_unused=True"):
        learner.adapt(loss)
    learner.adapt(loss, allow_unused=True)
    assert_same(learner.module.spare, model.spare)
    model[0].weight.requires_grad_(False)
    learner = maml.clone(allow_unused=True)
    loss = F.mse_loss(learner(batch[0][0]), batch[1][0])
    with pytest.raises(RuntimeError, match=r"do not require grad: '0.weight'; pass allow_nograd=True"):
        learner.adapt(loss)
    learner.adapt(loss, allow_nograd=True)
    F.mse_loss(learner(batch[2][0]), batch[3][0]).backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None
    assert MAML(model, 0.1, allow_nograd=True).allow_unused  # learn2learn's default
    with pytest.raises(RuntimeError, match="outside"):
        maml.clone(allow_nograd=True).adapt(torch.zeros(()))
    with pytest.raises(ValueError, match="one number"):
        maml.clone(allow_nograd=True).adapt(torch.zeros(3, requires_grad=True))


def test_clones_share_buffers_and_keep_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(torch.tanh(self.a(x))))

    model, x = Tied().double(), torch.randn(5, 3, dtype=torch.float64)
    learner = MAML(model, 0.1).clone()
    assert learner.a.weight is learner.b.weight
    learner.adapt(learner(x).square().mean())
    assert learner.a.weight is learner.b.weight and learner.a.weight is not model.a.weight
    assert int(model.norm.num_batches_tracked) == 1


def test_recurrent_clone() -> None:
    model, x = nn.LSTM(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    learner = MAML(model, 0.5).clone()
    before = learner(x)[0].square().mean()
    learner.adapt(before)
    after = learner(x)[0].square().mean()
    assert after < before
    after.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_attributes_of_the_module() -> None:
    class Named(nn.Linear):
        motto = "learn"

    maml = MAML(Named(2, 1), 0.1)
    assert maml.motto == "learn" and maml.in_features == 2
    with pytest.raises(AttributeError):
        _ = maml.nothing_of_the_kind
    x = torch.randn(3, 2)
    assert_same(maml(x), maml.module(x))
