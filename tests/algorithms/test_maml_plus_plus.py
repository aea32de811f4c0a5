"""mtml.MAMLPlusPlus: what it switches on, when, and to what gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases.few_shot import curves, perceptron, trained
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression
from torch import nn

import mtml
from mtml.algorithms.maml_plus_plus import multi_step_weights

K = 3


def loss(output: Any, target: Any) -> Any:
    return (output - target).square().mean()


def learner(**options: Any) -> mtml.MAMLPlusPlus:
    torch.manual_seed(1)
    return mtml.MAMLPlusPlus(mlp(3, 6, 2), lr=0.2, steps=K, loss="mse", **options)


def test_weights_are_those_that_were_published() -> None:
    """Recomputed as the paper's code does, epoch by epoch."""
    for steps, epochs in ((5, 10), (3, 15), (2, 4)):
        for epoch in range(epochs):
            weights = [1.0 / steps] * steps
            decay, least = 1.0 / steps / epochs, 0.03 / steps
            for i in range(steps - 1):
                weights[i] = max(weights[i] - epoch * decay, least)
            weights[-1] = min(weights[-1] + epoch * (steps - 1) * decay, 1.0 - (steps - 1) * least)
            assert multi_step_weights(steps, epoch, epochs) == pytest.approx(weights)
        assert multi_step_weights(steps, epochs, epochs) is None
    assert multi_step_weights(1, 0, 10) is None and multi_step_weights(5, 0, 0) is None


@pytest.mark.parametrize("epoch", [0, 2, 2.5, 4])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_a_plain_loop_at_every_epoch(epoch: float, training: bool) -> None:
    """First order until epoch 2, the losses of all steps until epoch 4; in eval mode neither."""
    maml, data = learner(multi_step_epochs=4, first_order_epochs=2).train(training), regression()
    maml.epoch = epoch
    weights = multi_step_weights(K, epoch, 4) if training else None
    rates = maml.lr.as_dict()
    wanted = oracle(
        maml.module, data, loss, lambda name, k: rates[name][k], K,
        first_order=training and epoch < 2, step_weights=None if weights is None else [0.0, *weights],
    )  # fmt: skip
    found = maml.meta_loss(*data)
    assert_same(found, wanted.loss)
    own = list(maml.parameters())
    assert len(own) == 8  # four tensors, and a rate per step for each
    assert_same(gradients(found, own), gradients(wanted.loss, own))
    apart = maml.task_gradients(*data)
    assert_same(
        [g.sum(0) for g in apart.values()], torch.autograd.grad(wanted.loss.sum(), list(maml.module.parameters()))
    )


def test_control_the_first_epochs_are_first_order_and_later_ones_are_not() -> None:
    maml, data = learner(multi_step_epochs=0, first_order_epochs=2), regression()
    own, found = list(maml.module.parameters()), []
    for epoch in (0, 1.9, 2):
        maml.epoch = epoch
        found.append(gradients(maml.meta_loss(*data), own))
    assert_same(found[0], found[1])
    assert all(float((a - b).norm() / b.norm()) > 1e-3 for a, b in zip(found[0], found[2], strict=True))
    assert_same(gradients(maml.meta_loss(*data, first_order=True), own), found[0])


def test_batch_norm_has_rows_for_every_step_without_rates() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)).double()
    maml, data = mtml.MAMLPlusPlus(copy.deepcopy(model), lr=0.2, steps=K), classification()
    assert isinstance(maml.module[1], mtml.PerStepBatchNorm) and maml.module[1].weight.shape == (K, 5)
    assert set(maml.lr.as_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    rates = mtml.InnerLR(model[0], 0.2)
    plain = mtml.MAML(copy.deepcopy(model), 0.2, steps=K, batch_norm="per_step")
    assert_same(maml.meta_loss(*data), plain.meta_loss(*data, step_weights=[1 / K] * K))
    assert maml.explain(*data).path == "fused" and mtml.MAMLPlusPlus(model, rates, batch_norm="batch").lr is rates
    assert isinstance(model[1], nn.BatchNorm1d)


def test_what_a_call_says_goes_before_the_epoch() -> None:
    maml, data = learner(), regression()
    last = maml.meta_loss(*data, step_weights=[0.0, 0.0, 1.0])
    assert not torch.allclose(maml.meta_loss(*data), last)
    assert_same(maml.eval().meta_loss(*data), last)
    every = maml.train().meta_loss(*data, query_steps=True)
    assert every.shape == (K + 1, 3)
    assert_same(maml.meta_loss(*data), every[1:].mean(0))
    assert_same(maml.meta_loss(*data, steps=2), every[1:3].mean(0))


def test_paths_outlive_an_epoch() -> None:
    maml, data = learner(), regression()
    maml.meta_loss(*data)
    finder = maml._paths.now
    maml.epoch = 3
    assert finder is not None and finder.fresh() and maml.epoch == 3.0


def test_cosine() -> None:
    maml = learner()
    optimizer = torch.optim.Adam(maml.parameters(), 1e-3)
    schedule, rates = maml.cosine(optimizer, 10, floor=1e-5), []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 1e-3 and rates[5] == pytest.approx((1e-3 + 1e-5) / 2) and rates[10] == pytest.approx(1e-5)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="multi_step_epochs: expected at least 0, got -1"):
        learner(multi_step_epochs=-1)
    with pytest.raises(ValueError, match="first_order_epochs: "):
        learner(first_order_epochs=float("nan"))


def test_it_learns() -> None:
    maml = mtml.MAMLPlusPlus(perceptron(1, 1), lr=0.05, steps=K, loss="mse", multi_step_epochs=1)
    before, after = trained(maml, curves, 200)
    assert after < 0.3 * before
