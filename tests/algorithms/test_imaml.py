"""mtml.IMAML: implicit meta-gradients, against closed forms and against differentiating a long loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.few_shot import curves, perceptron, trained
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.algorithms import imaml as module
from mtml.tasks import TaskBatch

D = torch.float64
T, S, Q = 3, 7, 5
STRENGTH = 0.7


def batch(grad: bool = False) -> TaskBatch:
    parts = [torch.randn(T, n, o, dtype=D) for n, o in ((S, 3), (S, 2), (Q, 3), (Q, 2))]
    masks = torch.rand(T, S, dtype=D) + 0.1, torch.rand(T, Q, dtype=D) + 0.1
    return TaskBatch(*(t.requires_grad_(grad) for t in (*parts, *masks)))


def line(strength: Any = STRENGTH, **options: Any) -> mtml.IMAML:
    model = nn.Linear(3, 2).to(D)
    return mtml.IMAML(model, lr=0.3, strength=strength, steps=130, cg_steps=10, loss="mse", **options)


def closed(weight: Tensor, bias: Tensor, strength: Any, data: TaskBatch) -> Tensor:
    """Query losses [T] at the minimum of sum w (x W + b - y)^2 / (2 sum w) + strength / 2 |(W, b) - (W0, b0)|^2."""
    theta = torch.cat((weight, bias[:, None]), 1).T  # [4, 2]
    losses = []
    for t in range(T):
        x = torch.cat((data.sx[t], torch.ones(S, 1, dtype=D)), 1)
        w = data.support_mask[t] / data.support_mask[t].sum()
        hessian = x.T @ (w[:, None] * x)
        phi = torch.linalg.solve(
            hessian + strength * torch.eye(4, dtype=D), strength * theta + x.T @ (w[:, None] * data.sy[t])
        )
        error = (torch.cat((data.qx[t], torch.ones(Q, 1, dtype=D)), 1) @ phi - data.qy[t]).square().mean(1)
        losses.append((data.query_mask[t] * error).sum() / data.query_mask[t].sum())
    return torch.stack(losses)


def gradients(losses: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((torch.linspace(0.5, 1.5, T, dtype=D) * losses).sum(), tensors)


@pytest.mark.parametrize("backend", ["auto", "general", "torch"])
def test_equal_to_the_closed_form(backend: str) -> None:
    """Values, and gradients of theta, lambda, inputs, targets and masks, where the inner problem is quadratic."""
    strength = nn.Parameter(torch.tensor(STRENGTH, dtype=D))
    learner, data = line(strength, backend=backend), batch(grad=True)
    assert any(p is strength for p in learner.parameters())
    own = learner.module
    wanted = closed(own.weight, own.bias, strength, data)
    tensors = [own.weight, own.bias, strength, *data]
    found = learner.meta_forward(data)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-9, atol=1e-11)
    grads, expected = gradients(found.loss, tensors), gradients(wanted, tensors)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-11)
    adapted = learner.adapt_tasks(data)
    torch.testing.assert_close(adapted.loss(data), wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients(adapted.loss(data), tensors), expected, rtol=1e-9, atol=1e-11)


def test_control_without_the_inverse_the_gradient_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What proves that second order is there: identity in place of (I + H / lambda)^-1, and fewer products."""
    learner, data = line(), batch()
    own = list(learner.module.parameters())
    wanted = gradients(closed(*own, STRENGTH, data), own)
    torch.testing.assert_close(gradients(learner.meta_loss(data), own), wanted, rtol=1e-9, atol=1e-11)
    learner.cg_steps = 1
    assert float((gradients(learner.meta_loss(data), own)[0] - wanted[0]).norm() / wanted[0].norm()) > 1e-3
    monkeypatch.setattr(module, "conjugate_gradients", lambda matrix, b, steps: b)
    assert float((gradients(learner.meta_loss(data), own)[0] - wanted[0]).norm() / wanted[0].norm()) > 0.1


def unrolled(learner: mtml.IMAML, data: TaskBatch, names: list[str], steps: int, lr: float) -> Tensor:
    """Query losses by differentiating every inner step."""
    theta = {n: p for n, p in learner.module.named_parameters() if n in names}
    losses = []
    for t in range(len(data.sx)):
        phi = theta
        for _ in range(steps):
            loss = (functional_call(learner.module, phi, (data.sx[t],)) - data.sy[t]).square().mean()
            pull = sum((phi[n] - theta[n]).square().sum() for n in names)
            total = loss + learner.strength / 2 * pull
            grads = torch.autograd.grad(total, list(phi.values()), create_graph=True)
            phi = {n: p - lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        losses.append((functional_call(learner.module, phi, (data.qx[t],)) - data.qy[t]).square().mean())
    return torch.stack(losses)


@pytest.mark.parametrize("params", [None, "2.*", ["0.weight", "2.bias"]])
def test_equal_to_a_long_loop_differentiated(params: Any) -> None:
    """Of a network, and of what is not adapted too."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(D)
    options: dict[str, Any] = {"strength": 1.5, "steps": 150, "cg_steps": 40, "loss": "mse", "params": params}
    learner, data = mtml.IMAML(model, lr=0.3, **options), TaskBatch(*batch()[:4])
    names = list(learner.adapt_tasks(data).params)
    wanted, found = unrolled(learner, data, names, 150, 0.3), learner.meta_loss(data)
    own = list(model.parameters())
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(gradients(found, own), gradients(wanted, own), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", [None, mtml.inner.SGD(momentum=0.8), mtml.inner.Adam(eps=1e-3)])
def test_every_inner_rule_finds_the_same_solution(rule: Any) -> None:
    learner, data = line(update=rule), batch()
    learner.lr = 0.01 if isinstance(rule, mtml.inner.Adam) else 0.2
    learner.steps = 1500 if isinstance(rule, mtml.inner.Adam) else 200
    own = list(learner.module.parameters())
    wanted = closed(*own, STRENGTH, data)
    found = learner.meta_loss(data)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients(found, own), gradients(wanted, own), rtol=1e-4, atol=1e-6)


def test_one_step_from_theta_is_that_of_maml() -> None:
    """The pull is 0 at theta."""
    learner, data = line(), batch()
    maml = mtml.MAML(learner.module, lr=0.3, loss="mse")
    for steps in (0, 1):
        with torch.no_grad():
            found = learner.meta_forward(data, steps=steps)
            wanted = maml.meta_forward(data, steps=steps)
        torch.testing.assert_close(tuple(found), tuple(wanted), rtol=1e-12, atol=1e-12)
    rates = {"weight": torch.tensor([0.3, 0.1], dtype=D).reshape(2, 1, 1), "bias": 0.2}
    learner.lr = rates
    maml.lr = {"weight": 0.3, "bias": 0.2}
    torch.testing.assert_close(learner.adapt_tasks(data, steps=1).params, maml.adapt_tasks(data).params)
    assert learner.meta_forward(data, steps=2).support_losses.shape == (2, T)


def test_tasks_stand_alone() -> None:
    learner, data = line(), batch()
    whole = learner.adapt_tasks(data).params["weight"]
    broken = data._replace(sx=data.sx.index_fill(0, torch.tensor([1]), float("nan")))
    found = learner.adapt_tasks(broken).params["weight"]
    assert torch.equal(found[0], whole[0]) and torch.equal(found[2], whole[2]) and found[1].isnan().all()


def test_solved_rows_stay() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=D))
    b = torch.stack((torch.zeros(3, dtype=D), torch.tensor([1.0, 0.0, 0.0], dtype=D), torch.ones(3, dtype=D)))
    found = module.conjugate_gradients(lambda v: v @ matrix, b, 6)
    torch.testing.assert_close(found, b / matrix.diagonal())


def test_copies_and_no_grad() -> None:
    learner, data = line(), batch()
    wanted = learner.meta_loss(data)
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        other.meta_loss(data).sum().backward()
        assert torch.equal(other.meta_loss(data), wanted) and learner.module.weight.grad is None
    with torch.no_grad():
        assert not learner.meta_loss(data).requires_grad
    assert not learner.adapt_tasks(data).detach().params["weight"].requires_grad
    assert list(learner.state_dict()) == ["module.weight", "module.bias"]


def test_what_changes_before_the_backward_pass_is_noticed_or_does_not_count() -> None:
    strength = nn.Parameter(torch.tensor(STRENGTH, dtype=D))
    learner, data = line(strength), batch()
    own = list(learner.module.parameters())
    wanted = gradients(learner.meta_loss(data), own)
    loss = learner.meta_loss(data)
    with torch.no_grad():
        strength.add_(1.0)
        learner.module.weight.add_(1.0)
    torch.testing.assert_close(gradients(loss, own), wanted)
    shared = mtml.IMAML(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(D), 0.1, loss="mse", params="1.*")
    loss = shared.meta_loss(*data[:4])
    with torch.no_grad():
        shared.module[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_damping_stands_on_the_diagonal() -> None:
    """Against the matrix itself, column by column."""
    learner, data = line(damping=0.5), batch()
    found = gradients(learner.meta_loss(data), list(learner.module.parameters()))
    phi = {n: t.detach().requires_grad_() for n, t in learner.adapt_tasks(data).params.items()}
    maml = mtml.MAML(learner.module, 1.0, loss="mse")
    queries = gradients(maml.meta_loss(data, steps=0, start=phi), list(phi.values()))
    b = torch.cat([c.flatten(1) for c in queries], 1)  # [T, 8]
    with torch.no_grad():
        columns = []
        for v in torch.eye(8, dtype=D).expand(T, -1, -1).unbind(1):
            given = {"weight": v[:, :6].reshape(T, 2, 3), "bias": v[:, 6:]}
            products = maml.hvp(data.sx, data.sy, given, support_mask=data.support_mask, start=phi)
            columns.append(torch.cat([h.flatten(1) for h in products.values()], 1))
    hessian = torch.stack(columns, 2)
    wanted = torch.linalg.solve(1.5 * torch.eye(8, dtype=D) + hessian / STRENGTH, b).sum(0)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found]), wanted, rtol=1e-9, atol=1e-11)


def test_differentiated_twice_it_raises() -> None:
    learner, data = line(), batch()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(learner.meta_loss(data).sum(), learner.module.weight, create_graph=True)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    found = line().explain(batch())
    assert found.path == "fused" and found.steps == 130 and "130 steps in one call" in found.reason
    assert "10 conjugate gradients" in capsys.readouterr().out
    found = line(update=mtml.inner.Adam()).explain(batch())
    assert found.path == "fused" and found.steps == 130 and "130 times over" in found.reason


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_errors_name_the_argument() -> None:
    model, data = nn.Linear(3, 2).to(D), batch()
    rate = nn.Parameter(torch.tensor(0.1, dtype=D))
    assert raised(lambda: mtml.IMAML(model, rate)).startswith("lr: expected numbers or tensors that require no grad")
    assert raised(lambda: mtml.IMAML(model, mtml.InnerLR(model))).startswith("lr: expected numbers or tensors")
    assert raised(lambda: mtml.IMAML(model, 0.1, update=mtml.inner.SGD(momentum=rate))).startswith("update: expected")
    assert raised(lambda: mtml.IMAML(model, 0.1, update=lambda *a: a)).startswith("update: expected a rule")
    assert raised(lambda: mtml.IMAML(model, 0.1, strength=0.0)).startswith("strength: expected above 0, got 0.0")
    assert raised(lambda: mtml.IMAML(model, 0.1, cg_steps=0)).startswith("cg_steps: expected at least 1")
    assert raised(lambda: mtml.IMAML(model, 0.1, batch_norm="per_step")).startswith("batch_norm: ")
    learner = line()
    assert raised(lambda: learner.meta_loss(data, first_order=True)).startswith("first_order: iMAML has no such option")
    assert raised(lambda: learner.meta_loss(data, step_weights=[1.0])).startswith("step_weights: iMAML")
    assert raised(lambda: learner.adapt_tasks(data, keep_steps=True)).startswith("keep_steps: iMAML")
    learner.strength = torch.tensor(-1.0)
    assert raised(lambda: learner.meta_loss(data)).startswith("strength: expected")


def test_it_learns() -> None:
    options: dict[str, Any] = {"strength": 2.0, "steps": 8, "cg_steps": 5, "loss": "mse"}
    before, after = trained(mtml.IMAML(perceptron(1, 1), lr=0.05, **options), curves, 80)
    assert after < 0.4 * before


@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_steps_beyond_the_solution_change_nothing_in_float32(scale: float) -> None:
    """Residuals of roundings were divided by each other until they were infinite."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(50, 3, 3, generator=generator)
    a, b = 0.8 * torch.eye(3) + 0.1 * root @ root.mT / 3, scale * torch.randn(50, 3, generator=generator)
    found = module.conjugate_gradients(lambda v: torch.einsum("tij,tj->ti", a, v), b, 40)
    torch.testing.assert_close(found, torch.linalg.solve(a, b), rtol=1e-4, atol=1e-6 * scale)
