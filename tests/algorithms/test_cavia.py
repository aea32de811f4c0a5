"""mtml.CAVIA: context parameters, against a plain loop; functa's latents among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.few_shot import curves, trained
from cases.maml_oracle import assert_same, gradients, oracle, regression
from torch import Tensor, nn

import mtml


def loss(output: Any, target: Any) -> Any:
    return (output - target).square().mean()


def net(inputs: int = 3, outputs: int = 2, size: int = 4, width: int = 7) -> nn.Sequential:
    layers = mtml.Context(size), nn.Linear(inputs + size, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers)


class Field(nn.Module):
    """A SIREN whose latent shifts its sines."""

    def __init__(self, latent: int = 5, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("latent", torch.zeros(latent))
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 1)
        self.shift = nn.Linear(latent, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.sin(3.0 * (self.first(x) + self.shift(self.latent))))
        return out


def test_equal_to_a_plain_loop_with_its_control() -> None:
    model, data = net().double(), regression()
    cavia = mtml.CAVIA(model, lr=0.5, steps=3, loss="mse")
    wanted = oracle(model, data, loss, 0.5, 3, ["0.context"])
    found = cavia.meta_loss(*data)
    assert_same(found, wanted.loss)
    own = list(model.parameters())
    expected = gradients(wanted.loss, own)
    assert_same(gradients(found, own), expected)
    assert cavia.explain(*data).path == "fused" and cavia.explain(*data).adapted == ["0.context"]
    first = gradients(oracle(model, data, loss, 0.5, 3, ["0.context"], first_order=True).loss, own)
    differ = [float((a - b).norm() / a.norm()) for a, b in zip(expected, first, strict=True)]
    assert differ[0] > 1e-3  # the columns that read the context
    first_order = mtml.CAVIA(model, 0.5, "*context", True, steps=3, loss="mse")
    assert_same(gradients(first_order.meta_loss(*data), own), first)


def test_latents_with_a_rate_for_every_entry() -> None:
    """functa: Meta-SGD on latents."""
    field = Field().double()
    rates = mtml.InnerLR(field, 0.3, per="element", params="latent", min=0.0, max=1.0)
    cavia = mtml.CAVIA(field, rates, "latent", steps=3, loss="mse")
    x, y = torch.rand(4, 9, 2, dtype=torch.float64), torch.rand(4, 9, 1, dtype=torch.float64)
    wanted = oracle(field, (x, y, x, y), loss, lambda name, k: rates.as_dict()[name], 3, ["latent"])
    found = cavia.meta_loss(x, y, x, y)
    assert_same(found, wanted.loss)
    own = [p for p in cavia.parameters() if p.requires_grad]
    assert any(p is rates.rates[0] for p in own)
    assert_same(gradients(found, own), gradients(wanted.loss, own))
    assert cavia.explain(x, y, x, y).path == "fused" and not field.latent.any()


def test_contexts_are_what_a_task_is() -> None:
    """Stored and given back, they are the adapted models."""
    model, (sx, sy, qx, _) = net().double(), regression()
    cavia = mtml.CAVIA(model, lr=0.5, steps=3, loss="mse")
    adapted = cavia.adapt_tasks(sx, sy)
    stored = adapted.detach().params
    assert stored["0.context"].shape == (3, 4)
    again = cavia.adapt_tasks(sx, sy, steps=0, start=stored)
    torch.testing.assert_close(again(qx), adapted(qx))
    assert not model[0].context.any()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"context: expected buffers or frozen parameters, but '1.weight'"):
        mtml.CAVIA(net(), 0.1, ["*context", "1.weight"])
    with pytest.raises(ValueError, match=r"params: .* matches no"):
        mtml.CAVIA(nn.Linear(2, 1), 0.1)
    with pytest.raises(TypeError, match="context: expected names"):
        mtml.CAVIA(net(), 0.1, None)
    with pytest.raises(ValueError, match="size: expected at least 1"):
        mtml.Context(0)
    frozen = net()
    frozen[1].weight.requires_grad_(False)
    assert list(mtml.CAVIA(frozen, 0.1, ["*context", "1.weight"], loss="mse").adapt_tasks(
        torch.randn(2, 3, 3), torch.randn(2, 3, 2)).params) == ["1.weight", "0.context"]  # fmt: skip


def test_it_learns() -> None:
    torch.manual_seed(0)
    cavia = mtml.CAVIA(net(1, 1, 4, 32), lr=0.5, steps=3, loss="mse")
    before, after = trained(cavia, curves, 400)
    assert after < 0.4 * before
