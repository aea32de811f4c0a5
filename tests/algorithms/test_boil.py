"""mtml.BOIL and mtml.FOMAML: MAML with another choice of what is adapted, or of what is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
from cases.few_shot import clusters, curves, perceptron, trained
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from torch import nn

import mtml


def loss(output: Any, target: Any) -> Any:
    return (output - target).square().mean()


def test_boil_adapts_the_body_alone_to_exact_second_order() -> None:
    model, data = mlp(3, 6, 5, 2), regression()
    boil = mtml.BOIL(model, lr=0.2, head="4.*", steps=3, loss="mse")
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    wanted = oracle(model, data, loss, 0.2, 3, names)
    found = boil.meta_loss(*data)
    assert_same(found, wanted.loss)
    own = list(model.parameters())
    expected = gradients(wanted.loss, own)
    assert_same(gradients(found, own), expected)
    assert list(boil.adapt_tasks(*data[:2]).params) == names and boil.explain(*data).path == "fused"
    # control: without second order it is another gradient, of the head too
    first = gradients(oracle(model, data, loss, 0.2, 3, names, first_order=True).loss, own)
    assert all(float((a - b).norm() / a.norm()) > 1e-3 for a, b in zip(expected, first, strict=True))
    assert_same(gradients(mtml.BOIL(model, 0.2, "4.*", True, steps=3, loss="mse").meta_loss(*data), own), first)


def test_boil_follows_what_is_frozen_and_knows_shared_tensors() -> None:
    model, data = mlp(3, 6, 2), regression()
    boil = mtml.BOIL(model, lr=0.2, head=["2.*"], loss="mse")
    model[0].bias.requires_grad_(False)
    assert list(boil.adapt_tasks(*data[:2]).params) == ["0.weight"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied.append(tied[0])
    assert list(mtml.BOIL(tied, 0.1, head="3.*", loss="mse").adapt_tasks(*regression(3, 5, 4, 4, 4)[:2]).params) == [
        "2.weight",
        "2.bias",
    ]


def test_boil_refuses_what_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"params: .* matches no"):
        mtml.BOIL(mlp(3, 4, 2), 0.1, head="head.*")
    with pytest.raises(ValueError, match="the predicate matched no tensor"):
        mtml.BOIL(mlp(3, 4, 2), 0.1, head="*")
    with pytest.raises(TypeError, match="head: expected names or patterns"):
        mtml.BOIL(mlp(3, 4, 2), 0.1, head=None)


def test_fomaml_is_the_gradient_at_the_adapted_parameters() -> None:
    model, data = mlp(3, 6, 2), regression()
    found = mtml.FOMAML(model, lr=0.2, steps=3, loss="mse")
    wanted = oracle(model, data, loss, 0.2, 3, first_order=True)
    assert_same(found.meta_loss(*data), wanted.loss)
    own = list(model.parameters())
    assert_same(gradients(found.meta_loss(*data), own), gradients(wanted.loss, own))
    exact = gradients(oracle(model, data, loss, 0.2, 3).loss, own)
    assert all(
        float((a - b).norm() / a.norm()) > 1e-3
        for a, b in zip(exact, gradients(found.meta_loss(*data), own), strict=True)
    )
    assert found.first_order


def test_boil_learns() -> None:
    before, after = trained(mtml.BOIL(perceptron(6, 3), lr=0.3, head="4.*", steps=3), clusters, 200)
    assert after < 0.5 * before


def test_fomaml_learns() -> None:
    before, after = trained(mtml.FOMAML(perceptron(1, 1), lr=0.05, steps=3, loss="mse"), curves, 200)
    assert after < 0.4 * before
