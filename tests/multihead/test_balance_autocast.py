"""mtml.balance under autocast: trunks with normalisation, features in half precision, heads in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.balance import backward, gram

HEADS = {"a": mtml.Classification(3), "b": mtml.Regression(2), "c": mtml.MultiLabel(4)}
FORMS = ("parameters", "features", "separate", "both")


class Net(nn.Module):
    def __init__(self, norm: str, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        # no biases: before a normalisation over the batch their gradients are 0 up to rounding
        if norm == "maps":
            self.trunk = nn.Sequential(
                nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 6, 1, bias=False)
            )
            heads: dict[str, Any] = {"a": mtml.Segmentation(3), "b": mtml.Segmentation(4)}
            self.x = torch.randn(5, 2, 6, 6)
            self.targets = {"a": torch.randint(3, (5, 4, 4)), "b": torch.rand(5, 4, 4, 4).softmax(1)}
        else:
            kind = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
            self.trunk = nn.Sequential(nn.Linear(5, 16, bias=False), kind(16), nn.Tanh(), nn.Linear(16, 6, bias=False))
            heads = HEADS
            self.x = torch.randn(12, 5)
            self.targets = {"a": torch.randint(3, (12,)), "b": torch.randn(12, 2), "c": torch.rand(12, 4)}
        if last:
            self.trunk.append(nn.BatchNorm2d(6) if norm == "maps" else kind(6))
        self.heads = mtml.MultiHead(6, heads, "sum")

    def losses(self, form: str, autocast: bool = True) -> tuple[mtml.HeadLosses, Any]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = self.trunk(self.x)
            losses = self.heads.loss(features, self.targets, separate=form in ("separate", "both"))
        assert features.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert losses.total.dtype == torch.float32
        parameters = list(self.trunk.parameters())
        shared = {"parameters": parameters, "both": parameters, "features": [features], "separate": None}[form]
        return losses, shared


every_net = pytest.mark.parametrize(
    ("norm", "last"), [(n, last) for n in ("batch", "layer", "maps") for last in (0, 1)]
)
every_form = pytest.mark.parametrize("form", FORMS)


@every_net
@every_form
@pytest.mark.parametrize("inside", [True, False])
def test_with_weights_of_one_it_is_the_ordinary_backward_pass(norm: str, last: bool, form: str, inside: bool) -> None:
    net, plain = Net(norm, last), Net(norm, last)
    losses, shared = net.losses(form)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        backward(losses, method=lambda g: g.diagonal() ** 0, shared=shared)
    sum(plain.losses("features")[0].per_head.values()).backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        scale = q.grad.abs().max().item()  # one pass a loss rounds otherwise than one pass for their sum
        torch.testing.assert_close(p.grad, q.grad, rtol=0.04, atol=0.04 * scale, msg=name)
    for p, q in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(p, q)  # statistics moved once


@every_net
@every_form
def test_products_are_near_those_of_float32(norm: str, last: bool, form: str) -> None:
    net, exact = Net(norm, last), Net(norm, last)
    found, want = gram(*net.losses(form)), gram(*exact.losses(form, autocast=False))
    lengths = want.diagonal().sqrt()
    assert ((found - want).abs() <= 0.1 * lengths[:, None] * lengths[None]).all()


@every_form
def test_products_and_update_are_not_rounded_to_half_precision(form: str) -> None:
    net = Net("layer", True)
    losses, shared = net.losses(form)
    outside = gram(losses, shared)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram(losses, shared)
        result = backward(losses, method="upgrad", shared=shared)
    again = Net("layer", True)
    losses, shared = again.losses(form)
    want = backward(losses, method="upgrad", shared=shared)
    assert torch.equal(inside, outside) and torch.equal(result.gram, want.gram)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "famo", "stch", "imtl_l", "cosmos"])
def test_weightings(name: str) -> None:
    net = Net("batch", True)
    net.heads = mtml.MultiHead(6, HEADS, name)
    losses, _ = net.losses("features")
    losses.total.backward()
    grads: list[Tensor] = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(grads) >= 12 and all(g.isfinite().all() for g in grads)
