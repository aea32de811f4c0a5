"""Starts and inputs that are made of the model's own parameters: the inner gradient is by theta_0 alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.maml_oracle import assert_same, mlp, regression
from torch import Tensor

import mtml
from mtml_kernels.general.choice import choose
from mtml_kernels.ops.inner_loop import BACKENDS

ENGINES = [name for name in ("cpu", "torch") if name in BACKENDS.available()]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general path by torch.autograd, a task after another."""
    from dataclasses import replace

    from mtml.paths import finder

    monkeypatch.setattr(finder, "choose", lambda *a: replace(choose(*a), mode="loop"))


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("what", ["start", "inputs"])
@pytest.mark.parametrize("recording", [False, True])
def test_the_general_path_is_the_engine(what: str, recording: bool) -> None:
    model, (sx, sy, qx, qy) = mlp(3, 5, 2), regression()

    def call(backend: str) -> list[Tensor]:
        maml = mtml.MAML(model, 0.3, steps=2, loss="mse", backend=backend)
        given: dict[str, Any] = {}
        inputs = sx
        if what == "start":
            features = torch.tanh(sx @ model[0].weight.T + model[0].bias)  # [T, S, 5]
            given["start"] = {"2.weight": features[:, :2]}
        else:
            inputs = sx + model[0].weight[0]
        if not recording:
            with torch.no_grad():
                return [maml.meta_loss(inputs, sy, qx, qy, **given)]
        loss = maml.meta_loss(inputs, sy, qx, qy, **given)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), list(model.parameters()), materialize_grads=True)]

    found = call("general")
    for engine in ENGINES:
        assert_same(call(engine), found)
