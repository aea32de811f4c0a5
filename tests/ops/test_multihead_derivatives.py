"""Derivatives of the multi-head losses by every transform of PyTorch's, to the third order, in any mixture.

The oracle is the same mixture over the formulas of `plain`, of PyTorch operations in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.transform_chains import Losses, basic_chains, chained, chains
from torch import Tensor
from torch.autograd import forward_ad

from mtml_kernels import HeadLoss, linear_multihead_gram, linear_multihead_loss, multihead_loss
from mtml_kernels.functional.multihead_loss import multihead_loss_and_gradients
from mtml_kernels.losses import HEAD_KINDS as KINDS

N, C = 2, 4


def _draw(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64)


CLASSES, POSITIVE, SAMPLES = _draw(C) + 0.5, 3 * _draw(N, C)[0], _draw(N) + 0.2
VALUES, PROBABILITIES, IDS = 2 * _draw(N, C, seed=1) - 1, _draw(N, C, seed=2).softmax(-1), torch.tensor([2, 0])


# PyTorch's cross_entropy and huber_loss have no gradients of tangents, or no forward mode over their backward.


def _log_p(z: Tensor) -> Tensor:
    return z - z.exp().sum(-1, keepdim=True).log()


def _huber(apart: Tensor, delta: float) -> Tensor:
    return torch.where(apart.abs() < delta, 0.5 * apart * apart, delta * (apart.abs() - 0.5 * delta))


def _classes(z: Tensor, y: Tensor, by_class: Tensor, smoothing: float) -> Tensor:
    hit = by_class[y] * _log_p(z).gather(1, y[:, None])[:, 0]
    total = (1 - smoothing) * hit + smoothing / C * (by_class * _log_p(z)).sum(1)
    return -total.sum() / by_class[y].sum()


def _gaussian(z: Tensor) -> Tensor:
    return 0.5 * (z[:, 2:] + (VALUES[:, :2] - z[:, :2]).square() / z[:, 2:].exp()).mean()


def _weighted(losses: Tensor) -> Tensor:
    return (SAMPLES * losses).sum() / SAMPLES.sum()


# of every head: its loss, target, weights of samples, classes and positives, and the loss as it reads
HEADS: list[tuple[HeadLoss, Tensor, Tensor | None, Tensor | None, Tensor | None, Callable[[Tensor], Tensor]]] = [
    (
        HeadLoss("cross_entropy", label_smoothing=0.1),
        IDS,
        None,
        CLASSES,
        None,
        lambda z: _classes(z, IDS, CLASSES, 0.1),
    ),
    (HeadLoss("cross_entropy"), PROBABILITIES, None, None, None, lambda z: -(PROBABILITIES * _log_p(z)).sum(1).mean()),
    (
        HeadLoss("cross_entropy"),
        IDS,
        SAMPLES,
        None,
        None,
        lambda z: _weighted(-_log_p(z).gather(1, IDS[:, None])[:, 0]),
    ),
    (
        HeadLoss("kl"),
        PROBABILITIES,
        None,
        None,
        None,
        lambda z: (PROBABILITIES * (PROBABILITIES.log() - _log_p(z))).sum(1).mean(),
    ),
    (
        HeadLoss("bce_with_logits"),
        VALUES.abs(),
        None,
        None,
        POSITIVE,
        lambda z: -(POSITIVE * VALUES.abs() * F.logsigmoid(z) + (1 - VALUES.abs()) * F.logsigmoid(-z)).mean(),
    ),
    (HeadLoss("mse"), VALUES, SAMPLES, None, None, lambda z: _weighted((z - VALUES).square().mean(1))),
    (HeadLoss("l1", "sum"), VALUES, None, None, None, lambda z: (z - VALUES).abs().sum()),
    (HeadLoss("huber", delta=0.4), VALUES, None, None, None, lambda z: _huber(z - VALUES, 0.4).mean()),
    (HeadLoss("gaussian_nll"), VALUES[:, : C // 2], None, None, None, _gaussian),
]
KINDS_OF_HEADS, TARGETS, OWN, BY_CLASS, BY_POSITIVE, PLAIN = map(list, zip(*HEADS, strict=True))
OPTIONS: dict[str, Any] = {"sample_weights": OWN, "class_weights": BY_CLASS, "pos_weights": BY_POSITIVE}
assert {kind.kind for kind in KINDS_OF_HEADS} == set(KINDS)  # type: ignore[attr-defined]


def _of(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([f(z) for f, z in zip(PLAIN, parts, strict=True)])  # type: ignore[operator]


def _logits(v: Tensor) -> tuple[Tensor, ...]:
    return v.view(len(HEADS), N, C).unbind()


def by_logits(v: Tensor) -> Tensor:
    return multihead_loss(_logits(v), TARGETS, KINDS_OF_HEADS, backend="cpu", **OPTIONS)  # type: ignore[arg-type]


def plain_by_logits(v: Tensor) -> Tensor:
    return _of(_logits(v))


D = 2
LINEAR = N * D + C * D + C  # a head's features, weight and bias


def _linear(v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    parts = (part.split([N * D, C * D, C]) for part in v.view(len(HEADS), LINEAR))
    return [(x.view(N, D), w.view(C, D), b) for x, w, b in parts]


def by_features(v: Tensor) -> Tensor:
    xs, ws, bs = map(list, zip(*_linear(v), strict=True))
    return linear_multihead_loss(xs, ws, bs, TARGETS, KINDS_OF_HEADS, backend="cpu", **OPTIONS)  # type: ignore[arg-type]


def plain_by_features(v: Tensor) -> Tensor:
    return _of(tuple(F.linear(*layer) for layer in _linear(v)))


STACK = torch.tensor([[2, 0], [1, 1], [3, 0]])


def by_stack(v: Tensor) -> Tensor:
    return multihead_loss(v.view(3, N, C), STACK, HeadLoss("cross_entropy", label_smoothing=0.2), backend="cpu")


def plain_by_stack(v: Tensor) -> Tensor:
    parts = zip(v.view(3, N, C), STACK, strict=True)
    return torch.stack([_classes(z, y, torch.ones_like(CLASSES), 0.2) for z, y in parts])


CASES: dict[str, tuple[Losses, Losses, list[int]]] = {
    "multihead_loss": (by_logits, plain_by_logits, [N * C] * len(HEADS)),
    "linear_multihead_loss": (by_features, plain_by_features, [LINEAR] * len(HEADS)),
    "stack": (by_stack, plain_by_stack, [N * C] * 3),
}
every_case = pytest.mark.parametrize("name", CASES)


def _point(sizes: list[int], seed: int = 0) -> Tensor:
    return 2 * _draw(sum(sizes), seed=seed) - 1


@pytest.mark.parametrize("chain", chains(extra=10))
def test_every_chain_of_transforms(chain: str) -> None:
    ours, plain, sizes = CASES["multihead_loss"]
    z = _point(sizes)
    torch.testing.assert_close(chained(chain, ours, sizes)(z), chained(chain, plain, sizes)(z))


@pytest.mark.parametrize("name", ["linear_multihead_loss", "stack"])
@pytest.mark.parametrize("chain", basic_chains())
def test_basic_chains(chain: str, name: str) -> None:
    ours, plain, sizes = CASES[name]
    z = _point(sizes)
    torch.testing.assert_close(chained(chain, ours, sizes)(z), chained(chain, plain, sizes)(z))


@every_case
def test_the_oracle_is_not_zero_where_the_losses_were(name: str) -> None:
    ours, _, sizes = CASES[name]
    for chain in ("jvp-jvp", "jacfwd-jacfwd", "jvp-grad-jvp"):
        assert chained(chain, ours, sizes)(_point(sizes))[:3].abs().min() > 1e-4, chain


@every_case
def test_two_tangents_by_finite_differences(name: str) -> None:
    ours, _, sizes = CASES[name]
    z, u, v, h = _point(sizes), _point(sizes, 1), _point(sizes, 2), 1e-3

    def along(a: Tensor) -> Tensor:
        return torch.func.jvp(ours, (a,), (u,))[1]

    found = torch.func.jvp(along, (z,), (v,))[1][:2]
    steps = [along(z + k * h * v)[:2] for k in (-2, -1, 1, 2)]
    torch.testing.assert_close(found, (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h))


# --- forward_ad, and what is eager around it --------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("chain", ["", "grad", "vmap", "vjp", "grad-vmap", "grad-grad"])
def test_dual_numbers(chain: str, name: str) -> None:
    """A tangent of the losses and of what torch.func makes of them, and its gradient."""
    results = []
    for f in CASES[name][:2]:
        sizes = CASES[name][2]
        z = _point(sizes).requires_grad_()
        with forward_ad.dual_level():
            made = chained(chain, f, sizes)(forward_ad.make_dual(z, _point(sizes, 1)))
            tangent = forward_ad.unpack_dual(made).tangent
        assert tangent is not None
        results.append((tangent, torch.autograd.grad(tangent.sum(), z)[0] if tangent.requires_grad else None))
    torch.testing.assert_close(*results)


@every_case
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_forward_over_an_eager_backward(inside: bool, recorded: bool, name: str) -> None:
    """The graph is made before the dual level or in it; the tangent comes with the cotangent or with the logits."""
    results = []
    for f in CASES[name][:2]:
        sizes = CASES[name][2]
        z, c, t = _point(sizes).requires_grad_(), _draw(len(sizes)), _draw(len(sizes), seed=1)
        before = f(z)
        with forward_ad.dual_level():
            losses = f(forward_ad.make_dual(z, _point(sizes, 1))) if inside else before
            cotangent = c if inside else forward_ad.make_dual(c, t)
            (g,) = torch.autograd.grad(losses, z, cotangent, create_graph=recorded)
            results.append(forward_ad.unpack_dual(g).tangent)
    assert results[1] is not None and results[1].any()
    torch.testing.assert_close(*results)


@every_case
def test_transforms_of_an_eager_backward(name: str) -> None:
    """torch.func around a backward pass of a graph that was made outside."""
    results = []
    for f in CASES[name][:2]:
        sizes = CASES[name][2]
        z, c = _point(sizes).requires_grad_(), _draw(3, len(sizes))
        losses = f(z)

        def pull(c: Tensor, losses: Tensor = losses, z: Tensor = z) -> Tensor:
            return torch.autograd.grad(losses, z, c, retain_graph=True)[0]

        many, along = torch.func.vmap(pull)(c), torch.func.jvp(pull, (c[0],), (c[1],))[1]
        results.append((many, along))
    torch.testing.assert_close(*results)


@every_case
@pytest.mark.parametrize("chain", ["", "grad"])
def test_a_pullback_differentiated_later(chain: str, name: str) -> None:
    """The losses run under reverse mode alone; forward mode comes to the pullback."""
    results = []
    for f in CASES[name][:2]:
        sizes = CASES[name][2]
        z, c, t = _point(sizes), _draw(len(sizes)), _draw(len(sizes), seed=1)
        pull = torch.func.vjp(chained(chain, f, sizes), z)[1]
        results.append((pull(c)[0], *torch.func.jvp(lambda c, pull=pull: pull(c)[0], (c,), (t,))))
    torch.testing.assert_close(*results)


@every_case
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_of_gradients_with_create_graph(order: int, name: str) -> None:
    results = []
    for f in CASES[name][:2]:
        sizes = CASES[name][2]
        z = _point(sizes).requires_grad_()
        value = f(z).sum()
        for k in range(order):
            (g,) = torch.autograd.grad(value, z, create_graph=True)
            value = g @ _point(sizes, k + 1)
        results.append(g)
    torch.testing.assert_close(*results)


# --- torch.compile ----------------------------------------------------------------------------------------------------

# Less jvp of jvp, which PyTorch fails to trace with its own losses too. Several heads take seconds to trace.
COMPILED = [("stack", c) for c in ("jvp", "jacfwd", "grad", "vmap-grad", "jvp-grad")] + [("multihead_loss", "jvp")]


@pytest.mark.parametrize(("name", "chain"), COMPILED)
def test_compiled_chains(name: str, chain: str) -> None:
    ours, plain, sizes = CASES[name]
    z = _point(sizes)
    torch._dynamo.reset()
    compiled = torch.compile(chained(chain, ours, sizes), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), chained(chain, plain, sizes)(z))


def test_a_compiled_tangent_through_autograd_and_linear_heads() -> None:
    x, w, y = _draw(N, D), _draw(C, D, seed=1), IDS

    def tangent(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.func.jvp(loss, (x,), (x.sin(),))[1]

    def ours(x: Tensor) -> Tensor:
        return tangent(lambda a: linear_multihead_loss(a, [w], None, [y], backend="cpu")[0], x)

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), tangent(lambda a: F.cross_entropy(F.linear(a, w), y), x))


# --- targets and weights, constants, labels ---------------------------------------------------------------------------


def test_tangents_of_targets_and_weights() -> None:
    """Forward mode follows them; reverse mode says that it does not, at any level."""
    z, y, w = _draw(N, C), VALUES, SAMPLES

    def ours(y: Tensor, w: Tensor) -> Tensor:
        return multihead_loss([z], [y], "mse", sample_weights=[w], backend="cpu")[0]

    def plain(y: Tensor, w: Tensor) -> Tensor:
        return (w * (z - y).square().mean(1)).sum() / w.sum()

    tangents = (_draw(N, C, seed=5), _draw(N, seed=6))
    torch.testing.assert_close(torch.func.jvp(ours, (y, w), tangents), torch.func.jvp(plain, (y, w), tangents))
    for at, name in enumerate(("targets", "sample_weights")):
        with pytest.raises(ValueError, match=rf"{name}\[0\].*requires no grad"):
            torch.func.grad(ours, at)(y, w)
        inner = (0, None) if at == 0 else (None, 0)
        with pytest.raises(ValueError, match=rf"{name}\[0\].*requires no grad"):
            many = torch.func.grad(lambda y, w, d=inner: torch.func.vmap(ours, d)(y, w).sum(), at)
            many(y[None] if at == 0 else y, w[None] if at == 1 else w)


def _gram(x: Tensor, ws: list[Tensor]) -> tuple[Tensor, ...]:
    return linear_multihead_gram(x, ws, None, [IDS, VALUES], ["cross_entropy", "mse"], backend="cpu")


def _gradients(x: Tensor, ws: list[Tensor]) -> tuple[Tensor, ...]:
    kinds = ["cross_entropy", "mse"]
    logits = [F.linear(x, w) for w in ws]
    losses, gradients = multihead_loss_and_gradients(logits, [IDS, VALUES], kinds, backend="cpu")
    return losses, *gradients


@pytest.mark.parametrize("f", [_gram, _gradients])
def test_what_has_no_derivative_is_a_constant_to_every_transform(f: Callable[..., tuple[Tensor, ...]]) -> None:
    x, ws = _draw(N, D), [_draw(C, D, seed=1), _draw(C, D, seed=2)]
    expected = f(x, ws)
    assert math.prod(len(t) for t in expected)

    def total(x: Tensor, *ws: Tensor) -> Tensor:
        return x.sum() * 0 + sum((t.square().sum() for t in f(x, list(ws))), torch.zeros(()))

    assert not any(t.any() for t in torch.func.grad(total, (0, 1, 2))(x, *ws))
    values, tangents = torch.func.jvp(lambda *a: f(a[0], list(a[1:])), (x, *ws), (x, *ws))
    torch.testing.assert_close(values, expected)
    assert not any(t.any() for t in tangents)
    with forward_ad.dual_level():
        found = f(forward_ad.make_dual(x, x), ws)
        assert all(forward_ad.unpack_dual(t).tangent is None for t in found)
    two = torch.stack([x, 2 * x])
    for a, b, both in zip(expected, f(2 * x, ws), torch.func.vmap(lambda a: f(a, ws))(two), strict=True):
        torch.testing.assert_close(both, torch.stack([a, b]))


@pytest.mark.parametrize("chain", ["jvp", "vmap-jvp", "jvp-vmap", "grad-jvp"])
def test_a_label_out_of_range_is_named_in_forward_mode(chain: str) -> None:
    def loss(v: Tensor) -> Tensor:
        return multihead_loss([v.view(N, C)], [torch.tensor([0, C])], backend="cpu")

    with pytest.raises(ValueError, match=rf"targets\[0\]: expected class ids in \[0, {C}\)"):
        chained(chain, loss, [N * C])(_draw(N * C))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_batch_of_labels(backend: str) -> None:
    z, y = _draw(3, N, C), torch.tensor([[0, 1], [2, 3], [3, 0]])

    def tangent(z: Tensor, y: Tensor) -> Tensor:
        return torch.func.jvp(lambda a: multihead_loss([a], [y], backend=backend)[0], (z,), (z.sin(),))[1]

    expected = torch.stack(
        [torch.func.jvp(lambda a, y=y: F.cross_entropy(a, y), (a,), (a.sin(),))[1] for a, y in zip(z, y, strict=True)]
    )
    torch.testing.assert_close(torch.func.vmap(tangent)(z, y), expected)
