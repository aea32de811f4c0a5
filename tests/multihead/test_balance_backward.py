"""mtml.balance.backward, gram and task_affinity on networks: which gradients end up where, and at what cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.balance import METHODS, backward, gram

HEADS = {"a": mtml.Classification(3), "b": mtml.Regression(2), "c": mtml.MultiLabel(4)}
FORMS = ("parameters", "features", "separate", "both", "dict")
every_form = pytest.mark.parametrize("form", FORMS)


class Net(nn.Module):
    """A trunk, three heads and a batch, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = mtml.MultiHead(6, HEADS, "sum")
        self.double()
        self.x = torch.randn(7, 5, dtype=torch.float64)
        self.targets = {
            "a": torch.randint(3, (7,)),
            "b": torch.randn(7, 2, dtype=torch.float64),
            "c": torch.rand(7, 4, dtype=torch.float64),
        }

    def losses(self, form: str, **masks: Tensor) -> tuple[Any, dict[str, Any]]:
        """The losses, and the arguments that say what is shared."""
        features = self.trunk(self.x)
        losses = self.heads.loss(features, self.targets, masks=masks, separate=form in ("separate", "both"))
        if form == "dict":
            return losses.per_head, {"shared": features}
        parameters = list(self.trunk.parameters())
        shared = {"parameters": parameters, "both": parameters, "features": [features], "separate": None}[form]
        return losses, {"shared": shared}

    def gradients_at(self, tensors: Callable[[Tensor], list[Tensor]]) -> list[list[Tensor]]:
        """Every loss's gradient at some tensors, plainly, [H][S]."""
        features = self.trunk(self.x)
        losses = self.heads.loss(features, self.targets).per_head.values()
        return [list(torch.autograd.grad(loss, tensors(features), retain_graph=True)) for loss in losses]


def flat_gram(gradients: list[list[Tensor]]) -> Tensor:
    rows = torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients])
    return rows @ rows.T


def plain_sum(g: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ones(len(g))


@every_form
def test_with_weights_of_one_it_is_the_ordinary_backward_pass(form: str) -> None:
    net, plain = Net(), Net()
    sum(plain.losses("features")[0].per_head.values()).backward()
    losses, where = net.losses(form)
    backward(losses, method=plain_sum, **where)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@every_form
@pytest.mark.parametrize("method", METHODS)
def test_shared_parameters_get_the_balanced_gradient(form: str, method: str) -> None:
    net = Net(1)
    losses, where = net.losses(form)
    options = {"generator": torch.Generator().manual_seed(3)} if method == "pcgrad" else {}
    result = backward(losses, method=method, **where, **options)
    at_parameters = net.gradients_at(lambda _: list(net.trunk.parameters()))
    at_features = net.gradients_at(lambda features: [features])
    want = flat_gram(at_parameters if form in ("parameters", "both") else at_features)
    torch.testing.assert_close(result.gram, want)
    if options:
        options["generator"].manual_seed(3)
    torch.testing.assert_close(result.weights, torch.from_numpy(METHODS[method](want.numpy(), **options)))
    for i, p in enumerate(net.trunk.parameters()):
        torch.testing.assert_close(p.grad, sum(w * g[i] for w, g in zip(result.weights, at_parameters, strict=True)))
    own = list(net.heads.layers.parameters())
    total = sum(net.heads.loss(net.trunk(net.x), net.targets).per_head.values())
    for p, g in zip(own, torch.autograd.grad(total, own), strict=True):
        torch.testing.assert_close(p.grad, g)


@every_form
def test_gradients_accumulate(form: str) -> None:
    net = Net()
    for _ in range(2):
        losses, where = net.losses(form)
        backward(losses, method="mgda", **where)
    twice = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    losses, where = net.losses(form)
    backward(losses, method="mgda", **where)
    for p, g in zip(net.parameters(), twice, strict=True):
        torch.testing.assert_close(2 * p.grad, g)


@every_form
@pytest.mark.parametrize("method", METHODS)
def test_an_absent_head_takes_no_part(form: str, method: str) -> None:
    net, without = Net(2), Net(2)
    masked, where = net.losses(form, b=torch.zeros(7))
    result = backward(masked, method=method, **where, **_seeded(method))
    del without.targets["b"]
    losses, where = without.losses(form)
    want = backward(losses, method=method, **where, **_seeded(method))
    assert result.weights[1] == 0 and want.weights[1] == 0
    for p, q in zip(net.trunk.parameters(), without.trunk.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert without.heads.layers["b"].weight.grad is None
    assert not net.heads.layers["b"].weight.grad.any()


def _seeded(method: str) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0)} if method == "pcgrad" else {}


@every_form
@pytest.mark.parametrize("method", METHODS)
def test_nan_is_seen(form: str, method: str) -> None:
    net = Net()
    net.targets["b"][0, 0] = float("nan")
    losses, where = net.losses(form)
    backward(losses, method=method, **where)
    assert all(p.grad.isnan().any() for p in net.trunk.parameters())
    assert net.heads.layers["a"].weight.grad.isfinite().all()


@pytest.mark.parametrize(("form", "passes"), [("parameters", 3), ("both", 3), ("features", 1), ("separate", 1)])
def test_passes_through_the_trunk(form: str, passes: int) -> None:
    net = Net()
    count = itertools.count()
    net.trunk[1].register_full_backward_hook(lambda *_: (next(count), None)[1])
    losses, where = net.losses(form)
    backward(losses, method="mgda", **where)
    assert next(count) == passes


def test_a_leaf_used_by_trunk_and_head_gets_both_gradients() -> None:
    tied = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, dtype=torch.float64)
    for weights in (torch.ones(2, dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64)):
        features = torch.tanh(tied @ x)
        first, second = (tied @ features).square().sum(), features.sum()
        backward([first, second], method=lambda g, w=weights: w.numpy(), shared=features)
        frozen = torch.tanh(tied @ x)
        head = (tied @ frozen.detach()).square().sum()
        trunk = weights[0] * (tied.detach() @ frozen).square().sum() + weights[1] * frozen.sum()
        (want,) = torch.autograd.grad(head + trunk, tied)
        torch.testing.assert_close(tied.grad, want)
        tied.grad = None


@pytest.mark.parametrize("separate", [False, True])
def test_a_parameter_that_only_some_share(separate: bool) -> None:
    """The first layer is shared, the second one is not: it gets the plain sum."""
    net, plain = Net(), Net()
    losses = net.heads.loss(net.trunk(net.x), net.targets, separate=separate)
    result = backward(losses, method="mgda", shared=net.trunk[0].parameters())
    each = plain.gradients_at(lambda _: list(plain.trunk[0].parameters()))
    for i, p in enumerate(net.trunk[0].parameters()):
        torch.testing.assert_close(p.grad, sum(w * g[i] for w, g in zip(result.weights, each, strict=True)))
    sum(plain.heads.loss(plain.trunk(plain.x), plain.targets).per_head.values()).backward()
    for p, q in zip(
        [*net.trunk[2].parameters(), *net.heads.parameters()],
        [*plain.trunk[2].parameters(), *plain.heads.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_head_s_weight_among_the_shared() -> None:
    """Where shared tensors are reached through the heads as well, every loss passes from its start."""
    net = Net()
    losses = net.heads.loss(net.trunk(net.x), net.targets, separate=True)
    shared = [*net.trunk.parameters(), net.heads.layers["b"].weight]
    torch.testing.assert_close(gram(losses, shared), gram(losses.per_head, shared))


def test_heads_on_different_features() -> None:
    trunks = [nn.Linear(3, 4), nn.Linear(3, 6)]
    heads = mtml.MultiHead({"a": 4, "b": 6, "c": 4}, HEADS, "sum")
    x = torch.randn(5, 3)
    first, second = (trunk(x) for trunk in trunks)
    targets = {"a": torch.randint(3, (5,)), "b": torch.randn(5, 2), "c": torch.rand(5, 4)}
    features = {"a": first, "b": second, "c": first}
    products = gram(heads.loss(features, targets, separate=True))
    assert products[0, 1] == 0 and products[1, 2] == 0 and products[0, 2] != 0
    torch.testing.assert_close(products, gram(heads.loss(features, targets), [first, second]))


def test_gram_leaves_the_graph_alone() -> None:
    net = Net()
    losses, _ = net.losses("separate")
    first = gram(losses)
    torch.testing.assert_close(gram(losses, list(net.trunk.parameters())), gram(losses, net.trunk.parameters()))
    assert torch.equal(first, gram(losses)) and first.dtype == torch.float64
    assert all(p.grad is None for p in net.parameters())
    losses.total.backward()


def test_affinity() -> None:
    x = torch.randn(6, requires_grad=True)
    directions = torch.randn(3, 6)
    losses = [*(directions @ x), (0 * x).sum(), torch.zeros(())]
    got = mtml.task_affinity(losses, x)
    want = nn.functional.cosine_similarity(directions[:, None], directions[None], -1)
    torch.testing.assert_close(got[:3, :3], want.double())
    assert torch.equal(got, got.T) and torch.equal(got.diagonal(), torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    assert not got[3:].any()


@pytest.mark.parametrize("losses", [lambda x: torch.stack([x.sum(), x.prod()]), lambda x: [x.sum(), x.prod()[None]]])
def test_forms_of_losses(losses: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert gram(losses(x), x).tolist() == [[2, 3], [3, 5]]


def test_half_precision_gradients() -> None:
    x = torch.randn(300).bfloat16().requires_grad_()
    rows = torch.randn(2, 300).bfloat16()
    result = backward([(row * x).sum() for row in rows], method="mgda", shared=[x])
    torch.testing.assert_close(result.gram, rows.double() @ rows.double().T, rtol=1e-5, atol=1e-4)
    assert x.grad.dtype == torch.bfloat16


def bad(losses: Any = None, **options: Any) -> Callable[[Tensor], Any]:
    return lambda x: backward([x.sum(), x.prod()] if losses is None else losses(x), **{"shared": x, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(method="pcgard"), ValueError, "method: expected one of 'aligned_mtl', .* got 'pcgard'"),
        (bad(method="mgda", c=0.4), TypeError, r"c: expected options of 'mgda' \(it has none\), got c="),
        (bad(method="cagrad", c=2.0), ValueError, "c: expected in"),
        (bad(shared=None), ValueError, "shared: expected the shared parameters or features, got None"),
        (bad(shared=[]), ValueError, "shared: expected at least one tensor that requires grad"),
        (bad(shared=["weight"]), TypeError, "shared: expected tensors"),
        (bad(lambda x: [x]), ValueError, r"losses: expected scalars.*\.mean\(\)"),
        (bad(lambda x: x.sum()), ValueError, r"losses: expected \[H\]"),
        (bad(lambda x: [x.detach().sum()]), ValueError, "losses: expected at least one that requires grad"),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, requires_grad=True))


def test_features_and_their_parameters_together_are_refused() -> None:
    w = torch.randn(3, requires_grad=True)
    features = torch.tanh(w)
    with pytest.raises(ValueError, match="do not depend on each other"):
        backward([features.sum()], shared=[features, w])


def test_one_of_several_outputs_of_a_node() -> None:
    w = torch.randn(6, requires_grad=True)
    first, second = torch.tanh(w).chunk(2)
    backward([first.sum(), first.prod() + second.sum()], method=plain_sum, shared=first)
    again = w.detach().clone().requires_grad_()
    left, right = torch.tanh(again).chunk(2)
    (left.sum() + left.prod() + right.sum()).backward()
    torch.testing.assert_close(w.grad, again.grad)
