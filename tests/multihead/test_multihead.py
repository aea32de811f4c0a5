"""mtml.MultiHead and its heads: predictions, losses, masks, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml
from mtml import Classification, MultiLabel, Regression, Segmentation, Tokens
from mtml.multihead.heads import Head

WEIGHTS = [0.5, 1.0, 2.0]

# head, shape of its features (D = 4), target, loss as PyTorch has it
CASES: list[tuple[Head, tuple[int, ...], Callable[[], Tensor], Callable[[Tensor, Tensor], Tensor]]] = [
    (Classification(3), (6, 4), lambda: torch.randint(3, (6,)), F.cross_entropy),
    (
        Classification(3, ignore_index=1, label_smoothing=0.1, class_weights=WEIGHTS, bias=False),
        (6, 4),
        lambda: torch.tensor([0, 1, 2, 2, 1, 0]),
        lambda z, y: F.cross_entropy(z, y, torch.tensor(WEIGHTS), ignore_index=1, label_smoothing=0.1),
    ),
    (Classification(3), (6, 4), lambda: torch.rand(6, 3).softmax(-1), F.cross_entropy),
    (
        Classification(3, loss="kl"),
        (6, 4),
        lambda: torch.rand(6, 3).softmax(-1),
        lambda z, y: F.kl_div(z.log_softmax(-1), y, reduction="batchmean"),
    ),
    (
        Classification(3, reduction="sum"),
        (6, 4),
        lambda: torch.randint(3, (6,)),
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    ),
    (Regression(2), (6, 4), lambda: torch.randn(6, 2), F.mse_loss),
    (Regression(2, loss="l1"), (6, 4), lambda: torch.randn(6, 2), F.l1_loss),
    (
        Regression(2, loss="huber", delta=0.3),
        (6, 4),
        lambda: torch.randn(6, 2),
        lambda z, y: F.huber_loss(z, y, delta=0.3),
    ),
    (
        Regression(2, loss="gaussian_nll"),
        (6, 4),
        lambda: torch.randn(6, 2),
        lambda z, y: F.gaussian_nll_loss(z[:, :2], y, z[:, 2:].exp(), eps=1e-12),
    ),
    (MultiLabel(3), (6, 4), lambda: torch.rand(6, 3), F.binary_cross_entropy_with_logits),
    (
        MultiLabel(3, pos_weight=WEIGHTS),
        (6, 4),
        lambda: torch.rand(6, 3),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(WEIGHTS)),
    ),
    (
        Segmentation(3, ignore_index=0),
        (2, 4, 3, 5),
        lambda: torch.randint(3, (2, 3, 5)),
        lambda z, y: F.cross_entropy(z, y, ignore_index=0),
    ),
    (Segmentation(3), (2, 4, 3, 5), lambda: torch.rand(2, 3, 3, 5).softmax(1), F.cross_entropy),
    (
        Tokens(3),
        (2, 5, 4),
        lambda: torch.randint(3, (2, 5)),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    ),
    (
        Tokens(3),
        (2, 5, 4),
        lambda: torch.rand(2, 5, 3).softmax(-1),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(0, 1)),
    ),
]

every_head = pytest.mark.parametrize("case", CASES, ids=[type(case[0]).__name__ for case in CASES])


@every_head
@pytest.mark.parametrize("separate", [False, True])
def test_loss_and_gradients(case: Any, separate: bool) -> None:
    head, shape, make, plain = case
    heads = mtml.MultiHead(4, {"it": head}, "sum")
    features, target = torch.randn(shape, requires_grad=True), make()
    layer = heads.layers["it"]
    prediction = heads(features)["it"]
    want = plain(prediction, target)
    losses = heads.loss(features, {"it": target}, separate=separate)
    torch.testing.assert_close(losses.per_head["it"], want)
    torch.testing.assert_close(losses.total, want)
    leaves = [features, layer.weight, *([] if layer.bias is None else [layer.bias])]
    torch.testing.assert_close(torch.autograd.grad(losses.total, leaves), torch.autograd.grad(want, leaves))
    assert (layer.bias is None) == (not head.bias)


@every_head
def test_prediction(case: Any) -> None:
    head, shape, _, _ = case
    heads = mtml.MultiHead(4, {"it": head})
    features, layer = torch.randn(shape), heads.layers["it"]
    wide = features.movedim(head.channels, -1)
    want = (wide @ layer.weight.T + (0 if layer.bias is None else layer.bias)).movedim(-1, head.channels)
    torch.testing.assert_close(heads(features)["it"], want)


@every_head
@pytest.mark.parametrize("rows", [False, True])
def test_masks_choose_samples_or_rows(case: Any, rows: bool) -> None:
    head, shape, make, plain = case
    if head.reduction == "sum" or getattr(head, "loss", "") == "kl":
        pytest.skip("PyTorch's function does not average rows")
    heads = mtml.MultiHead(4, {"it": head}, "sum")
    features, target = torch.randn(shape), make()
    prediction = heads(features)["it"]
    if not rows:
        keep = torch.arange(shape[0]) % 2 == 0
        got = heads.loss(features, {"it": target}, masks={"it": keep}).total
        torch.testing.assert_close(got, plain(prediction[keep], target[keep]))
    elif head.rank > 2:
        flat = prediction.movedim(head.channels, -1)
        keep = torch.rand(flat.shape[:-1]) > 0.4
        chosen = target.movedim(head.channels, -1)[keep] if target.ndim == prediction.ndim else target[keep]
        ignored = getattr(head, "ignore_index", -100)
        want = F.cross_entropy(flat[keep], chosen, ignore_index=ignored)
        torch.testing.assert_close(heads.loss(features, {"it": target}, masks={"it": keep}).total, want)


def test_masks_are_weights() -> None:
    heads = mtml.MultiHead(4, {"a": Classification(3), "b": Regression(2)}, "sum")
    x, y, z, w = torch.randn(6, 4), torch.randint(3, (6,)), torch.randn(6, 2), torch.rand(6)
    per_head = heads.loss(x, {"a": y, "b": z}, masks={"a": w, "b": w}).per_head
    out = heads(x)
    each = {"a": F.cross_entropy(out["a"], y, reduction="none"), "b": (out["b"] - z).square().mean(1)}
    for name, rows in each.items():
        torch.testing.assert_close(per_head[name], (w * rows).sum() / w.sum())


def many() -> tuple[mtml.MultiHead, dict[str, Tensor], dict[str, Tensor]]:
    """Five heads on three feature tensors of different ranks and widths."""
    specs = {"a": Classification(3), "s": Segmentation(4), "t": Tokens(6), "b": Regression(2), "m": MultiLabel(3)}
    heads = mtml.MultiHead({"a": 8, "b": 8, "s": 5, "t": 7, "m": 8}, specs)
    shared = torch.randn(5, 8)
    features = {"a": shared, "b": shared, "m": shared, "s": torch.randn(5, 5, 3, 2), "t": torch.randn(5, 9, 7)}
    targets = {
        "a": torch.randint(3, (5,)),
        "b": torch.randn(5, 2),
        "s": torch.randint(4, (5, 3, 2)),
        "t": torch.randint(6, (5, 9)),
        "m": torch.rand(5, 3),
    }
    return heads, features, targets


def test_heads_do_not_see_each_other() -> None:
    heads, features, targets = many()
    together = heads.loss(features, targets)
    assert list(together.per_head) == ["a", "s", "t", "b", "m"]
    assert {name: tuple(y.shape) for name, y in heads(features).items()} == {
        "a": (5, 3),
        "s": (5, 4, 3, 2),
        "t": (5, 9, 6),
        "b": (5, 2),
        "m": (5, 3),
    }
    for name in heads.heads:
        alone = heads.loss({name: features[name]}, {name: targets[name]})
        assert torch.equal(alone.per_head[name], together.per_head[name])
        assert all(alone.per_head[other] == 0 for other in heads.heads if other != name)
        assert torch.equal(heads({name: features[name]})[name], heads(features)[name])
    total, per_head = together
    assert total is together.total and per_head is together.per_head


def test_separate_copies() -> None:
    heads, features, targets = many()
    features = {name: x.requires_grad_() for name, x in features.items()}
    del targets["m"]
    losses = heads.loss(features, targets, separate=True)
    assert list(losses.copies) == ["a", "s", "t", "b"] and losses.sources["a"] is features["b"]
    grads = torch.autograd.grad(losses.total, list(losses.copies.values()), retain_graph=True)
    (whole,) = torch.autograd.grad(losses.total, features["a"])
    torch.testing.assert_close(grads[0] + grads[3], whole)
    assert not heads.loss(features, targets).copies


def test_it_trains_and_moves() -> None:
    trunk = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    specs = {"a": Classification(3, class_weights=torch.tensor(WEIGHTS)), "b": Regression(1)}
    heads = mtml.MultiHead(16, specs)
    model = nn.ModuleList([trunk, heads]).double()
    assert heads.layers["a"].class_weights.dtype == torch.float64
    assert sorted(heads.state_dict()) == sorted(
        ["layers.a.weight", "layers.a.bias", "layers.b.weight", "layers.b.bias", "weighting.log_vars"]
    )
    x = torch.randn(64, 4, dtype=torch.float64)
    targets = {"a": x[:, :3].argmax(1), "b": x.sum(1, keepdim=True)}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    before = heads.loss(trunk(x), targets)
    for _ in range(60):
        optimizer.zero_grad()
        heads.loss(trunk(x), targets).total.backward()
        optimizer.step()
    after = heads.loss(trunk(x), targets)
    assert all(after.per_head[name] < 0.5 * before.per_head[name] for name in specs)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(heads)))
    assert torch.equal(twin.loss(trunk(x), targets).total, after.total)


def test_second_derivatives() -> None:
    heads, features, targets = many()
    heads.double()
    features = {name: x.double().requires_grad_() for name, x in features.items()}
    targets = {name: y.double() if y.is_floating_point() else y for name, y in targets.items()}
    features["b"] = features["m"] = features["a"]
    leaves = [features["a"], features["s"], *heads.parameters()]

    def total(*values: Tensor) -> Tensor:
        state = {f"layer.{name}": p for (name, _), p in zip(heads.named_parameters(), values[2:], strict=True)}
        inputs = {**features, "a": values[0], "b": values[0], "m": values[0], "s": values[1]}
        return torch.func.functional_call(Whole(heads), state, (inputs, targets))

    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(total, leaves, fast_mode=True)


class Whole(nn.Module):
    """A MultiHead's total, as a module that functional_call can call."""

    def __init__(self, layer: mtml.MultiHead) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Any, targets: Any) -> Tensor:
        return self.layer.loss(features, targets).total


BAD_HEADS = [
    (lambda: mtml.MultiHead(4, {}), ValueError, "heads: expected at least one"),
    (lambda: mtml.MultiHead(4, {"a": 3}), TypeError, r"heads\['a'\]: expected a head such as mtml.Classification"),
    (lambda: mtml.MultiHead(4, {"a.b": Regression(1)}), ValueError, "'a.b'; rename that head"),
    (lambda: mtml.MultiHead(4, {"items": Regression(1)}), ValueError, "'items'; rename that head"),
    (lambda: mtml.MultiHead({"b": 4}, {"a": Regression(1)}), ValueError, "in_features: expected a width for a, got b"),
    (lambda: Classification(0), ValueError, "Classification: expected at least 1 output, got 0"),
    (lambda: Classification(3, loss="mse"), ValueError, "loss: expected one of 'cross_entropy', 'kl'"),
    (lambda: Classification(3, class_weights=[1.0]), ValueError, r"class_weights: expected \[3\]"),
    (lambda: Classification(3, loss="kl", label_smoothing=0.1), ValueError, "got 'kl'"),
    (lambda: MultiLabel(3, pos_weight=[1.0]), ValueError, r"pos_weight: expected \[3\]"),
    (lambda: Regression(3, loss="huber", delta=0.0), ValueError, "delta above 0"),
    (lambda: Regression(3, reduction="none"), ValueError, "reduction 'mean' or 'sum'"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_HEADS, ids=range(len(BAD_HEADS)))
def test_bad_heads(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


GOOD: dict[str, Any] = {"features": torch.zeros(5, 4), "targets": {"a": torch.zeros(5).long(), "b": torch.zeros(5, 1)}}
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(5, 3)}, ValueError, r"features\['a'\]: expected \[N, D\] with D = 4 for Classification"),
    ({"features": torch.zeros(5, 2, 4)}, ValueError, r"features\['a'\]: expected \[N, D\]"),
    ({"features": {"a": torch.zeros(5, 4)}}, ValueError, "features: expected some for 'b', got a"),
    ({"features": {"z": torch.zeros(5, 4)}}, ValueError, "features: expected names out of a, b; got 'z'"),
    ({"targets": {"z": torch.zeros(5)}}, ValueError, "targets: expected names out of a, b; got 'z'"),
    ({"targets": torch.zeros(5)}, TypeError, "targets: expected {head: tensor}"),
    ({"targets": {"a": torch.zeros(4).long()}}, ValueError, r"targets\['a'\]: expected class ids \[5\] or"),
    ({"targets": {"a": torch.zeros(5)}}, ValueError, r"probabilities \[5, 3\] for Classification"),
    ({"targets": {"a": torch.zeros(5).bool()}}, TypeError, r"use \.long\(\)"),
    ({"targets": {"b": torch.zeros(5)}}, ValueError, r"targets\['b'\]: expected \[5, 1\] for Regression"),
    ({"targets": {"b": torch.zeros(5, 1).long()}}, TypeError, r"targets\['b'\]: expected floating point"),
    ({"masks": {"z": torch.zeros(5)}}, ValueError, "masks: expected names out of a, b; got 'z'"),
    ({"masks": {"a": torch.zeros(4)}}, ValueError, r"masks\['a'\]: expected \[5\], one a sample or row"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    heads = mtml.MultiHead(4, {"a": Classification(3), "b": Regression(1)})
    with pytest.raises(error, match=message):
        heads.loss(**{**GOOD, **change})
