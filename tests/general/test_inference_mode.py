"""Under torch.inference_mode the inner loop still adapts, whichever way the general path runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.maml_oracle import classification
from torch import nn

import mtml
from mtml.paths import finder
from mtml_kernels.general.choice import choose


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_the_same_as_without_grad(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder, "choose", lambda *a: replace(choose(*a), mode=mode))
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double()
    sx, sy, qx, qy = classification()
    with torch.no_grad():
        wanted = mtml.MAML(model, 0.3, steps=2, backend="general").meta_forward(sx, sy, qx, qy)
    with torch.inference_mode():
        maml = mtml.MAML(model, 0.3, steps=2, backend="general")
        found = maml.meta_forward(sx.clone(), sy, qx.clone(), qy)
        adapted = maml.adapt_tasks(sx, sy)
    torch.testing.assert_close(tuple(found), tuple(wanted))
    assert not torch.equal(adapted.params["0.weight"][0], model[0].weight)
