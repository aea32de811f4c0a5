"""What holds for every algorithm: the meta-gradient against finite differences, tasks alone, copies, batches."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.tasks import TaskBatch

D = torch.float64
T, C, S, Q = 3, 3, 6, 5


def trunk(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width), nn.Tanh()).to(D)


def net() -> nn.Sequential:
    return nn.Sequential(*trunk(), nn.Linear(5, C)).to(D)


def context() -> nn.Sequential:
    return nn.Sequential(mtml.Context(3), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, C)).to(D)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)).to(D)


def imaml(**options: Any) -> mtml.IMAML:
    return mtml.IMAML(net(), lr=0.3, strength=0.8, steps=80, cg_steps=40, **options)


EXACT: dict[str, Callable[[], Any]] = {
    "MAML": lambda: mtml.MAML(net(), lr=0.5, steps=2),
    "MAML with Adam": lambda: mtml.MAML(net(), lr=0.1, steps=2, update=mtml.inner.Adam(eps=1e-2)),
    "MetaSGD": lambda: mtml.MetaSGD(net(), lr=0.5, steps=2),
    "MAMLPlusPlus": lambda: mtml.MAMLPlusPlus(normed(), lr=0.5, steps=2),
    "ANIL": lambda: mtml.ANIL(trunk(), nn.Linear(5, C).to(D), lr=0.5, steps=2),
    "BOIL": lambda: mtml.BOIL(net(), lr=0.5, head="4.*", steps=2),
    "CAVIA": lambda: mtml.CAVIA(context(), lr=1.0, steps=2),
    "ProtoMAML": lambda: mtml.ProtoMAML(trunk(), nn.Linear(5, C).to(D), lr=0.2, steps=2),
    "R2D2": lambda: mtml.R2D2(trunk(), C),
    "IMAML": imaml,
    "IMAML with momentum": lambda: imaml(update=mtml.inner.SGD(momentum=0.3)),
    "MetaCurvature": lambda: mtml.MetaCurvature(net(), lr=0.5, steps=2),
}
APPROXIMATE: dict[str, Callable[[], Any]] = {
    "FOMAML": lambda: mtml.FOMAML(net(), lr=0.5, steps=2),
    "MAMLPlusPlus at first": lambda: mtml.MAMLPlusPlus(normed(), lr=0.5, steps=2, first_order_epochs=1),
    "CAVIA of first order": lambda: mtml.CAVIA(context(), 1.0, first_order=True, steps=2),
    "Reptile": lambda: mtml.Reptile(net(), lr=0.5, steps=2),
}
EVERY = EXACT | APPROXIMATE


def batch(masks: bool = False) -> TaskBatch:
    torch.manual_seed(5)
    y = torch.stack([torch.randperm(S) % C for _ in range(T)])
    sets = torch.randn(T, S, 4, dtype=D), y, torch.randn(T, Q, 4, dtype=D), torch.randint(C, (T, Q))
    return TaskBatch(*sets, *((torch.rand(T, S, dtype=D) + 0.1, torch.rand(T, Q, dtype=D)) if masks else ()))


def made(name: str) -> Any:
    torch.manual_seed(4)
    return EVERY[name]()


def slope_and_gradient(learner: Any, data: TaskBatch) -> tuple[Tensor, Tensor]:
    """Along one random direction through everything that learns: by central differences, and by the backward pass."""
    own = [p for p in learner.parameters() if p.requires_grad]
    along = [torch.randn_like(p) for p in own]
    loss = learner.meta_loss(data).sum()
    grads = torch.autograd.grad(loss, own, materialize_grads=True)
    wanted = torch.stack([(g * v).sum() for g, v in zip(grads, along, strict=True)]).sum()
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(own, along, strict=True):
                p.add_(step * v)
            values.append(learner.meta_loss(data).sum())
    return (values[0] - values[1]) / 2e-5, wanted


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_the_meta_gradient_is_the_derivative_of_the_meta_loss(name: str, masks: bool) -> None:
    slope, gradient = slope_and_gradient(made(name), batch(masks))
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_control_what_drops_second_order_is_seen_to(name: str) -> None:
    slope, gradient = slope_and_gradient(made(name), batch())
    assert float((gradient - slope).abs() / slope.abs()) > 1e-3  # a hundred times what is allowed above


@pytest.mark.parametrize("name", EVERY)
def test_a_task_does_not_depend_on_the_others(name: str) -> None:
    learner, data = made(name), batch()
    whole = learner.meta_loss(data)
    alone = [learner.meta_loss(TaskBatch(*(t[i : i + 1] for t in data[:4]))) for i in range(T)]
    torch.testing.assert_close(torch.cat(alone), whole)


@pytest.mark.parametrize("name", EVERY)
def test_copies_batches_and_calls_without_grad_are_the_same(name: str) -> None:
    learner, data = made(name), batch(masks=True)
    wanted = learner.meta_loss(data)
    assert wanted.shape == (T,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart = learner.meta_loss(*data[:4], support_mask=data[4], query_mask=data[5])
    assert torch.equal(apart, wanted)
    with torch.no_grad():
        torch.testing.assert_close(learner.meta_loss(data), wanted)
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        torch.testing.assert_close(other.meta_loss(data), wanted)
        other.meta_loss(data).sum().backward()
    assert all(p.grad is None for p in learner.parameters())
    other = made(name)
    other.load_state_dict(learner.state_dict())
    torch.testing.assert_close(other.meta_loss(data), wanted)


@pytest.mark.parametrize("name", EVERY)
def test_adapted_models_and_explanations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    learner, data = made(name), batch()
    adapted = learner.adapt_tasks(data)
    assert adapted(data.qx).shape == (T, Q, C) and adapted.loss(data).shape == (T,)
    one = adapted.detach().task(1)
    with torch.no_grad():
        if "PlusPlus" not in name:  # a module of its own has no inner steps, and reads the last row
            torch.testing.assert_close(one(data.qx[1]), adapted(data.qx)[1])
    found = learner.explain(data)
    assert found.path in ("fused", "head", "ridge", "general") and "path: " in capsys.readouterr().out
