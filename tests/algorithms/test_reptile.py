"""mtml.Reptile: the published steps, against a plain loop."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases.few_shot import curves, endless, judged, perceptron, trained
from torch import Tensor, nn

import mtml
from mtml.tasks import TaskBatch

D = torch.float64
T, K, S = 3, 4, 5
RULES: dict[str, Any] = {"descent": lambda: None, "adam": lambda: mtml.inner.Adam(betas=(0.0, 0.999), eps=1e-6)}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(D)


def data(per_step: bool = False) -> tuple[Tensor, Tensor]:
    lead = (T, K, S) if per_step else (T, S)
    return torch.randn(*lead, 2, dtype=D), torch.randn(*lead, 1, dtype=D)


def learner(rule: str = "descent", **options: Any) -> mtml.Reptile:
    return mtml.Reptile(net(), lr=0.1, steps=K, loss="mse", update=RULES[rule](), **options)


def plain(model: nn.Module, rule: str, x: Tensor, y: Tensor, eps: float, serial: bool) -> dict[str, Tensor]:
    """The parameters after one step, by torch.optim on copies of the model, a task after another."""
    moved, model = [], copy.deepcopy(model)
    for t in range(T):
        own = copy.deepcopy(model)
        options: dict[str, Any] = {"betas": (0.0, 0.999), "eps": 1e-6} if rule == "adam" else {}
        optimizer = (torch.optim.Adam if rule == "adam" else torch.optim.SGD)(own.parameters(), 0.1, **options)
        for k in range(K):
            sx, sy = (x[t, k], y[t, k]) if x.ndim == 4 else (x[t], y[t])
            optimizer.zero_grad()
            (own(sx) - sy).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            change = [phi - theta for phi, theta in zip(own.parameters(), model.parameters(), strict=True)]
            moved.append(change)
            for p, c in zip(model.parameters(), change, strict=True):
                p.add_(eps * c if serial else 0.0)
    with torch.no_grad():
        for i, p in enumerate([] if serial else model.parameters()):
            p.add_(eps * torch.stack([change[i] for change in moved]).mean(0))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
def test_a_step_is_that_of_a_plain_loop(rule: str, serial: bool, per_step: bool) -> None:
    reptile, (x, y) = learner(rule), data(per_step)
    wanted = plain(reptile.module, rule, x, y, 0.3, serial)
    losses = reptile.meta_step(x, y, step_size=0.3, serial=serial, per_step=per_step)
    assert losses.shape == (K, T)
    found = {name: p.detach() for name, p in reptile.module.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_serial_and_batched_differ_and_agree_on_one_task() -> None:
    (x, y), first = data(), learner()
    both = first, copy.deepcopy(first)
    for reptile, serial in zip(both, (True, False), strict=True):
        reptile.meta_step(x[:1], y[:1], step_size=0.3, serial=serial)
    torch.testing.assert_close(*(dict(r.module.named_parameters()) for r in both))
    for reptile, serial in zip(both, (True, False), strict=True):
        reptile.meta_step(x, y, step_size=0.3, serial=serial)
    assert not torch.allclose(both[0].module[0].weight, both[1].module[0].weight)


@pytest.mark.parametrize("per_step", [False, True])
def test_the_loss_makes_the_batched_step_with_any_optimizer(per_step: bool) -> None:
    reptile, (x, y) = learner("adam"), data(per_step)
    other = copy.deepcopy(reptile)
    optimizer = torch.optim.SGD(reptile.parameters(), 0.3)
    found = reptile.meta_forward(x, y, per_step=per_step)
    found.loss.mean().backward()
    optimizer.step()
    losses = other.meta_step(x, y, step_size=0.3, per_step=per_step)
    torch.testing.assert_close(dict(reptile.module.named_parameters()), dict(other.module.named_parameters()))
    assert torch.equal(found.support_losses, losses) and found.output is None


def test_control_it_is_not_the_gradient_of_maml() -> None:
    """theta - phi is neither FOMAML's gradient nor MAML's, though all of them fall along the same tasks."""
    reptile, (x, y) = learner(), data()
    own = list(reptile.module.parameters())
    grads = [torch.autograd.grad(reptile.meta_loss(x, y).mean(), own)[0]]
    for algorithm in (mtml.FOMAML, mtml.MAML):
        maml = algorithm(reptile.module, lr=0.1, steps=K, loss="mse")
        grads.append(torch.autograd.grad(maml.meta_loss(x, y, x, y).mean(), own)[0])
    for a, b in itertools.combinations(grads, 2):
        assert float((a / a.norm() - b / b.norm()).norm()) > 1e-3


def test_masks_and_batches_and_what_is_frozen() -> None:
    reptile, (x, y) = learner(), data()
    mask = torch.tensor([1.0, 1, 1, 0, 0], dtype=D).expand(T, S)
    cut = reptile.meta_loss(x[:, :3], y[:, :3])
    torch.testing.assert_close(reptile.meta_loss(TaskBatch(x, y, x, y, mask, mask)), cut)
    torch.testing.assert_close(reptile.meta_loss(x, y, support_mask=mask), cut)
    other = copy.deepcopy(reptile)
    reptile.meta_step(TaskBatch(x, y, x, y, mask, mask), step_size=0.5, serial=True)
    other.meta_step(x[:, :3], y[:, :3], step_size=0.5, serial=True)
    torch.testing.assert_close(dict(reptile.module.named_parameters()), dict(other.module.named_parameters()))
    frozen = learner(params="*")
    frozen.module[0].weight.requires_grad_(False)
    before = frozen.module[0].weight.clone()
    frozen.meta_loss(x, y).mean().backward()
    frozen.meta_step(x, y, step_size=0.5)
    assert frozen.module[0].weight.grad is None and torch.equal(frozen.module[0].weight, before)


def test_nothing_of_the_inner_loop_is_kept() -> None:
    reptile, (x, y) = learner(), data()
    assert not reptile._inner(x, y, {})[0]["0.weight"].requires_grad
    assert reptile.explain(x, y).path == "fused"


def test_errors_name_the_argument() -> None:
    reptile, (x, y) = learner(), data()
    with pytest.raises(ValueError, match="step_weights: Reptile has no such option"):
        reptile.meta_loss(x, y, step_weights=[1.0] * K)
    with pytest.raises(ValueError, match="query_steps, start: Reptile"):
        reptile.meta_loss(x, y, start={}, query_steps=True)
    with pytest.raises(ValueError, match="step_size: "):
        reptile.meta_step(x, y, step_size=float("nan"))


def test_it_learns() -> None:
    """As published, serially with a step size that falls to 0; and batched by Adam."""
    options: dict[str, Any] = {"steps": 8, "loss": "mse"}
    reptile = mtml.Reptile(perceptron(1, 1), lr=0.05, **options)
    before = judged(reptile, curves)
    for i, batch in zip(range(100), endless(curves), strict=False):
        reptile.meta_step(batch.sx, batch.sy, step_size=0.3 * (1 - i / 100), serial=True)
    assert judged(reptile, curves) < 0.5 * before
    before, after = trained(mtml.Reptile(perceptron(1, 1), lr=0.05, **options), curves, 150)
    assert after < 0.5 * before
