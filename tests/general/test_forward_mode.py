"""Forward mode over a whole meta-loss: parameters, rates and data of MAML, by torch.func and by forward_ad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import mtml
from mtml_kernels.errors import BackendUnavailable

pytestmark = pytest.mark.filterwarnings("ignore::mtml_kernels.errors.FallbackWarning")
Params = dict[str, Tensor]
Function = Callable[[Params], Tensor]

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "mse": (lambda z, y: (z - y).square().mean(), False),
    "l1": (F.l1_loss, False),
    "cross_entropy": (lambda z, y: -(z - z.exp().sum(1, keepdim=True).log()).gather(1, y[:, None]).mean(), True),
    "bce_with_logits": (lambda z, y: -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean(), False),
    "huber": (lambda z, y: torch.where((z - y).abs() < 1, (z - y) ** 2 / 2, (z - y).abs() - 0.5).mean(), False),
}


class Whole(nn.Module):
    """A MAML whose forward is its meta-loss, as functional_call needs it."""

    def __init__(self, maml: mtml.MAML) -> None:
        super().__init__()
        self.maml = maml

    def forward(self, *batch: Tensor) -> Tensor:
        return self.maml.meta_loss(*batch)


def make(loss: str = "mse", backend: str = "auto", steps: int = 2) -> tuple[Whole, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sx, qx = torch.randn(3, 5, 3).double(), torch.randn(3, 4, 3).double()
    ids = LOSSES[loss][1]
    sy, qy = (torch.randint(2, (3, n)) if ids else torch.rand(3, n, 2).double() for n in (5, 4))
    return Whole(mtml.MAML(model, 0.3, steps=steps, loss=loss, backend=backend)), (sx, sy, qx, qy)


def plain(whole: Whole, batch: tuple[Tensor, ...], loss: str = "mse", rate: Any = 0.3) -> Function:
    """[T] losses by torch.func.grad, one task after another."""
    model, steps, of = whole.maml.module, whole.maml.steps, LOSSES[loss][0]

    def judge(theta: Params, x: Tensor, y: Tensor) -> Tensor:
        return of(torch.func.functional_call(model, theta, (x,)), y)

    def found(params: Params) -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*batch, strict=True):
            theta = {name.removeprefix("maml.module."): p for name, p in params.items()}
            for _ in range(steps):
                g = torch.func.grad(judge)(theta, sx, sy)
                theta = {name: p - rate * g[name] for name, p in theta.items()}
            losses.append(judge(theta, qx, qy))
        return torch.stack(losses)

    return found


def ours(whole: Whole, batch: tuple[Tensor, ...]) -> Function:
    return lambda params: torch.func.functional_call(whole, params, batch)


def points(whole: Whole) -> tuple[Params, Params, Params]:
    params = {name: p.detach().clone() for name, p in whole.named_parameters()}
    first, second = ({n: torch.cos(k * p + k) for n, p in params.items()} for k in (3, 5))
    return params, first, second


def _grad(f: Function) -> Function:
    return lambda p: torch.cat([g.flatten() for g in torch.func.grad(lambda q: f(q).sum())(p).values()])


def _jvp(f: Function, t: Params) -> Function:
    return lambda p: torch.func.jvp(f, (p,), (t,))[1]


WAYS: dict[str, Callable[[Function, Params, Params, Params], Any]] = {
    "jvp": lambda f, p, t, u: torch.func.jvp(f, (p,), (t,)),
    "jvp of jvp": lambda f, p, t, u: _jvp(_jvp(f, t), u)(p),
    "jvp of grad": lambda f, p, t, u: _jvp(_grad(f), t)(p),
    "grad of jvp": lambda f, p, t, u: _grad(_jvp(f, t))(p),
    "jacfwd": lambda f, p, t, u: torch.func.jacfwd(f)(p),
    "vmap over tangents": lambda f, p, t, u: torch.func.vmap(lambda v: _jvp(f, v)(p))(
        {n: torch.stack([t[n], u[n]]) for n in t}
    ),
    "vmap over parameters": lambda f, p, t, u: torch.func.vmap(f)({n: torch.stack([p[n], t[n]]) for n in t}),
    "no_grad": lambda f, p, t, u: torch.no_grad()(torch.func.jvp)(f, (p,), (t,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_transform_of_the_parameters(loss: str, way: str) -> None:
    whole, batch = make(loss)
    results = [WAYS[way](f, *points(whole)) for f in (ours(whole, batch), plain(whole, batch, loss))]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_dual_parameters(loss: str, grad: bool) -> None:
    """Of tensors that require grad or not; then the tangent's gradient too."""
    if grad and loss == "cross_entropy":
        pytest.skip("PyTorch raises in the backward of the tangent of log_softmax, which it changes in place")
    whole, batch = make(loss)
    params, tangents, _ = points(whole)
    results = []
    for f in (ours(whole, batch), plain(whole, batch, loss)):
        leaves = {n: p.clone().requires_grad_(grad) for n, p in params.items()}
        with forward_ad.dual_level():
            made = f({n: forward_ad.make_dual(p, tangents[n]) for n, p in leaves.items()})
            tangent = forward_ad.unpack_dual(made).tangent
        assert tangent is not None
        found = torch.autograd.grad(tangent.sum(), list(leaves.values())) if grad else ()
        results.append((tangent.detach(), *found))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("first", [False, True])
def test_calls_before_and_after_run_in_the_engine(first: bool) -> None:
    """The path of a dual call is not remembered for others, nor the other way round."""
    whole, batch = make()
    params = points(whole)[0]
    model = whole.maml.module
    expected = plain(whole, batch)(params)
    if first:
        torch.testing.assert_close(whole(*batch), expected)
    qx = batch[2]
    with forward_ad.dual_level():
        loss = whole(*batch[:2], forward_ad.make_dual(qx, qx), batch[3])
        tangent = forward_ad.unpack_dual(loss).tangent
    wanted = torch.func.jvp(lambda q: plain(whole, (*batch[:2], q, batch[3]))(params), (qx,), (qx,))[1]
    torch.testing.assert_close(tangent, wanted)
    torch.testing.assert_close(whole(*batch), expected)
    assert whole.maml.explain(*batch).to_dict()["path"] == "fused" and next(model.parameters()).requires_grad


def test_tangents_of_everything_in_a_batch() -> None:
    whole, batch = make()
    params = points(whole)[0]
    mask = torch.rand(3, 5).double()

    def weighted(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor, m: Tensor) -> Tensor:
        return whole.maml.meta_loss(sx, sy, qx, qy, support_mask=m)

    def by_hand(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor, m: Tensor) -> Tensor:
        losses = []
        for t in range(3):
            theta = {name.removeprefix("maml.module."): p for name, p in params.items()}

            def support(theta: Params, t: int = t) -> Tensor:
                z = torch.func.functional_call(whole.maml.module, theta, (sx[t],))
                return (m[t] * (z - sy[t]).square().mean(1)).sum() / m[t].sum()

            for _ in range(2):
                g = torch.func.grad(support)(theta)
                theta = {name: p - 0.3 * g[name] for name, p in theta.items()}
            losses.append(F.mse_loss(torch.func.functional_call(whole.maml.module, theta, (qx[t],)), qy[t]))
        return torch.stack(losses)

    given = (*batch, mask)
    tangents = tuple(t.sin() for t in given)
    torch.testing.assert_close(torch.func.jvp(weighted, given, tangents), torch.func.jvp(by_hand, given, tangents))


@pytest.mark.parametrize("by", ["jvp", "dual"])
def test_tangents_of_a_learned_rate(by: str) -> None:
    whole, batch = make()
    rate = torch.tensor(0.3, dtype=torch.float64)
    params = points(whole)[0]

    def meta(rate: Tensor) -> Tensor:
        return mtml.MAML(whole.maml.module, rate, steps=2, loss="mse").meta_loss(*batch)

    wanted = torch.func.jvp(lambda r: plain(whole, batch, rate=r)(params), (rate,), (torch.ones_like(rate),))[1]
    if by == "jvp":
        found = torch.func.jvp(meta, (rate,), (torch.ones_like(rate),))[1]
    else:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(meta(forward_ad.make_dual(rate, torch.ones_like(rate)))).tangent
    torch.testing.assert_close(found.detach(), wanted)


def test_adapted_models_carry_tangents() -> None:
    whole, (sx, sy, qx, _) = make()

    def outputs(x: Tensor) -> Tensor:
        return whole.maml.adapt_tasks(x, sy)(qx)

    found = torch.func.jvp(outputs, (sx,), (sx,))[1]
    h = 1e-5
    torch.testing.assert_close(found, (outputs(sx + h * sx) - outputs(sx - h * sx)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_engine_asked_for_by_name_says_what_to_do() -> None:
    whole, batch = make(backend="cpu")
    params, tangents, _ = points(whole)
    with pytest.raises(BackendUnavailable, match="general"):
        torch.func.jvp(ours(whole, batch), (params,), (tangents,))
    with forward_ad.dual_level(), pytest.raises(BackendUnavailable, match=r"dual level.*'general'"):
        ours(whole, batch)({n: forward_ad.make_dual(p, tangents[n]) for n, p in params.items()})


@pytest.mark.parametrize("every", [False, True])
def test_dual_attributes_are_named(every: bool) -> None:
    """As forward_ad's tutorial puts them in: no parameters, so that they would not be adapted."""
    whole, batch = make()
    layer: Any = whole.maml.module[0]  # type: ignore[index]
    with forward_ad.dual_level():
        for name in ("weight", "bias") if every else ("weight",):
            p = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, forward_ad.make_dual(p, p))
        with pytest.raises(ValueError, match=r"'0\.weight' with its tangent among the parameters.*functional_call"):
            whole(*batch)


def test_what_is_frozen_stays_frozen() -> None:
    whole, batch = make()
    layer: Any = whole.maml.module[2]  # type: ignore[index]
    for p in layer.parameters():
        p.requires_grad_(False)
    moving = {n: p.detach().clone() for n, p in whole.named_parameters() if p.requires_grad}
    found = torch.func.jvp(ours(whole, batch), (moving,), ({n: p.cos() for n, p in moving.items()},))
    model = whole.maml.module

    def by_hand(params: Params) -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*batch, strict=True):
            theta = {n.removeprefix("maml.module."): p for n, p in params.items()}
            for _ in range(2):

                def support(th: Params, sx: Tensor = sx, sy: Tensor = sy) -> Tensor:
                    return (torch.func.functional_call(model, th, (sx,)) - sy).square().mean()

                g = torch.func.grad(support)(theta)
                theta = {name: p - 0.3 * g[name] for name, p in theta.items()}
            losses.append(F.mse_loss(torch.func.functional_call(model, theta, (qx,)), qy))
        return torch.stack(losses)

    torch.testing.assert_close(found, torch.func.jvp(by_hand, (moving,), ({n: p.cos() for n, p in moving.items()},)))
