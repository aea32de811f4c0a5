"""mtml.MetaCurvature: transformed gradients, against a plain loop of Kronecker products."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases.few_shot import curves, perceptron, trained
from cases.maml_oracle import assert_same, classification, gradients, mlp, regression
from torch import Tensor, nn
from torch.func import functional_call

import mtml


def bent(learner: mtml.MetaCurvature) -> mtml.MetaCurvature:
    """With matrices that are neither the identity nor symmetric."""
    with torch.no_grad():
        for p in learner.update.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return learner


def kron(matrices: Any) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    for matrix in matrices:
        found = torch.kron(found, matrix)
    return found


def plain(
    learner: mtml.MetaCurvature, data: Any, loss: Any, lr: float, steps: int, first_order: bool = False
) -> Tensor:
    """Query losses [T]; each gradient as one vector, times the Kronecker product of its matrices."""
    names, losses = list(learner.update.index), []
    products = {n: kron(learner.update.matrices[learner.update.index[n]]) for n in names}
    for sx, sy, qx, qy in zip(*data, strict=True):
        fast = dict(learner.module.named_parameters())
        for _ in range(steps):
            value = loss(functional_call(learner.module, fast, (sx,)), sy)
            grads = torch.autograd.grad(value, [fast[n] for n in names], create_graph=True)
            grads = tuple(g.detach() for g in grads) if first_order else grads
            for n, g in zip(names, grads, strict=True):
                fast[n] = fast[n] - lr * (products[n] @ g.flatten()).reshape(g.shape)
        losses.append(loss(functional_call(learner.module, fast, (qx,)), qy))
    return torch.stack(losses)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_equal_to_a_plain_loop_with_its_control() -> None:
    learner, data = bent(mtml.MetaCurvature(mlp(3, 6, 2), lr=0.2, steps=3, loss="mse")), regression()
    own = list(learner.parameters())
    assert len(own) == 4 + 2 + 1 + 2 + 1
    found, wanted = learner.meta_loss(*data), plain(learner, data, mse, 0.2, 3)
    assert_same(found, wanted)
    expected = gradients(wanted, own)
    assert_same(gradients(found, own), expected)
    first = gradients(plain(learner, data, mse, 0.2, 3, first_order=True), own)
    assert all(float((a - b).norm() / a.norm()) > 1e-3 for a, b in zip(expected, first, strict=True))
    learner.first_order = True
    assert_same(gradients(learner.meta_loss(*data), own), first)


def test_convolutions_have_three_matrices() -> None:
    layers = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)
    learner = bent(mtml.MetaCurvature(nn.Sequential(*layers).double(), lr=0.2, steps=2, params=["0.weight", "3.*"]))
    shapes = [tuple(p.shape) for p in learner.update.parameters()]
    assert shapes == [(3, 3), (2, 2), (4, 4), (4, 4), (12, 12), (4, 4)]
    x, y = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64), torch.randint(4, (3, 5))
    data = x, y, x.flip(1), y.flip(1)
    own = list(learner.parameters())
    found, wanted = learner.meta_loss(*data), plain(learner, data, nn.functional.cross_entropy, 0.2, 2)
    assert_same(found, wanted)
    assert_same(gradients(found, own), gradients(wanted, own))


@pytest.mark.parametrize("rule", [None, mtml.inner.SGD(momentum=0.9), mtml.inner.Adam(eps=1e-3)])
def test_the_identity_is_maml(rule: Any) -> None:
    model, data = mlp(3, 5, 4), classification()
    learner = mtml.MetaCurvature(model, 0.1, steps=3, update=rule)
    maml = mtml.MAML(model, 0.1, steps=3, update=rule)
    own = list(model.parameters())
    ours, theirs = learner.meta_loss(*data), maml.meta_loss(*data)
    assert_same(ours, theirs)
    assert_same(gradients(ours, own), gradients(theirs, own))
    further = [m.adapt_tasks(*data[:2], start=m.adapt_tasks(*data[:2])).params for m in (learner, maml)]
    assert_same(list(further[0].values()), list(further[1].values()))


def test_rows_for_every_step_have_no_matrices() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()
    learner, data = mtml.MetaCurvature(model, 0.2, steps=2, batch_norm="per_step"), classification()
    assert list(learner.update.index) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert_same(learner.meta_loss(*data), mtml.MAML(learner.module, 0.2, steps=2).meta_loss(*data))


def test_the_loop_of_one_task_and_copies() -> None:
    learner, data = bent(mtml.MetaCurvature(mlp(3, 5, 2), lr=0.2, loss="mse")), regression()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the general path is what it asks for
        wanted = learner.meta_loss(*data)
    one = learner.clone()
    one.adapt(mse(one(data[0][0]), data[1][0]))
    assert_same(mse(one(data[2][0]), data[3][0]), wanted[0])
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert_same(other.meta_loss(*data), wanted)
    assert learner.explain(*data).path == "general"


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"update: expected a rule of mtml.inner"):
        mtml.MetaCurvature(mlp(3, 5, 2), 0.1, update=lambda *a: a)
    learner = mtml.MetaCurvature(mlp(3, 5, 2), 0.1, loss="mse", params="2.*")
    learner.params = None
    with pytest.raises(ValueError, match=r"params: '0.weight' has no curvature"):
        learner.meta_loss(*regression())


def test_it_learns() -> None:
    learner = mtml.MetaCurvature(perceptron(1, 1, 12), lr=0.05, steps=1, loss="mse")
    before, after = trained(learner, curves, 80)
    assert after < 0.5 * before
