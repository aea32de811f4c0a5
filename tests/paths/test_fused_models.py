"""Models in every spelling that fuses, through the engine: as plain autograd, at second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, oracle
from cases.program_models import FUSED
from torch import Tensor, nn

from mtml import MAML

APART = ("keyword inputs", "the input itself")  # the plain loop calls by position; nothing is adapted


def _batch(model: nn.Module, shapes: Any, tasks: int = 2, support: int = 3, query: int = 2) -> tuple[Any, ...]:
    """Inputs that are differentiated by, and targets of the output's shape."""

    def draw(n: int) -> tuple[Any, Tensor]:
        x = [torch.randn(tasks, n, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        out = model(*(each[0].detach().clone() for each in x))
        target = torch.randn(tasks, *out.shape, dtype=torch.float64)
        return x[0] if len(x) == 1 else tuple(x), target

    return (*draw(support), *draw(query))


@pytest.mark.parametrize("name", [name for name in FUSED if name not in APART])
def test_engine_equals_plain_autograd(name: str) -> None:
    torch.manual_seed(len(name))
    make, shapes = FUSED[name]
    model = make().double()
    batch = _batch(model, shapes)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    lr = 1e-4 if "siren" in name else 0.05  # a frequency of 30 makes longer steps chaotic
    maml = MAML(model, lr, steps=2, loss="mse", backend="cpu")
    loss = maml.meta_loss(*batch)
    expected = oracle(model, batch, F.mse_loss, lr, 2, names)
    assert_same(loss, expected.loss)
    leaves = list(model.parameters())
    for x in (batch[0], batch[2]):
        leaves += x if isinstance(x, tuple) else [x]
    found, plain = gradients(loss, leaves), gradients(expected.loss, leaves)
    scale = max(1.0, *(float(g.abs().max()) for g in plain if g is not None))
    assert_same(found, plain, atol=1e-10 * scale)
