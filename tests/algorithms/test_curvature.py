"""`hvp` of the learners: the same products on every path, for any model."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.tasks import TaskBatch

D = torch.float64
T, S = 2, 5


def conv() -> nn.Sequential:
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    return nn.Sequential(*layers).to(D)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Softplus(), nn.Linear(8, 3)).to(D)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(T, S, 1, 6, 6, dtype=D), torch.randint(3, (T, S))


def vectors(maml: mtml.MAML, names: Any = None) -> dict[str, Tensor]:
    own = dict(maml.module.named_parameters())
    return {n: torch.randn(T, *p.shape, dtype=D) for n, p in own.items() if names is None or n in names}


def twice(maml: mtml.MAML, x: Tensor, y: Tensor, v: dict[str, Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    """By double backward through the general path's support losses."""
    with torch.enable_grad():
        losses = mtml.MAML(maml.module, 1.0, loss=maml.loss, batch_norm=maml.batch_norm, backend="general").adapt_tasks(
            x, y, start=at
        )
        grads = torch.autograd.grad(losses.support_losses.sum(), [at[n] for n in v], create_graph=True)
        total = sum((g * v[n]).sum() for g, n in zip(grads, v, strict=True))
        assert isinstance(total, Tensor)
        return dict(zip(v, torch.autograd.grad(total, [at[n] for n in v]), strict=True))


@pytest.mark.parametrize("make", [conv, perceptron])
@pytest.mark.parametrize("backend", ["auto", "general"])
def test_equal_to_double_backward(make: Any, backend: str) -> None:
    maml, (x, y) = mtml.MAML(make(), 0.1, backend=backend), data()
    at = {n: t.requires_grad_() for n, t in vectors(maml).items()}
    for v in (vectors(maml), vectors(maml, [n for n in at if "weight" in n])):
        wanted = twice(maml, x, y, v, at)
        found = maml.hvp(x, y, v, start=at)
        assert list(found) == list(v)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)


def test_forms_of_a_call() -> None:
    maml, (x, y) = mtml.MAML(perceptron(), 0.1, params="3.*"), data()
    v = vectors(maml, ["3.weight", "3.bias"])
    wanted = maml.hvp(x, y, v)
    own = {n: p.expand(T, *p.shape) for n, p in maml.module.named_parameters() if n in v}
    for found in (
        maml.hvp(TaskBatch(x, y, x, y), vectors=v),
        maml.hvp(x, y, v, start=own),
        maml.hvp(x, y, v, start={"3.bias": own["3.bias"]}),
        maml.hvp(x, y, v, support_mask=torch.ones(T, S, dtype=D)),
    ):
        torch.testing.assert_close(found, wanted)
    adapted = maml.adapt_tasks(x, y)
    assert not torch.allclose(maml.hvp(x, y, v, start=adapted)["3.bias"], wanted["3.bias"])


def test_products_of_the_general_path_are_differentiable() -> None:
    maml, (x, y) = mtml.MAML(perceptron(), 0.1, backend="general"), data()
    v = vectors(maml)
    at = {n: t.requires_grad_() for n, t in vectors(maml).items()}
    total = sum((h * v[n]).sum() for n, h in maml.hvp(x, y, v, start=at).items())
    assert isinstance(total, Tensor)
    (grad,) = torch.autograd.grad(total, [at["3.bias"]])
    step = 1e-5
    moved = [at | {"3.bias": at["3.bias"].detach() + s * torch.eye(3, dtype=D)[0]} for s in (step, -step)]
    up, down = (sum((h * v[n]).sum(-1).sum() for n, h in maml.hvp(x, y, v, start=m).items()) for m in moved)
    torch.testing.assert_close(grad[:, 0].sum(), (up - down) / (2 * step), rtol=1e-5, atol=1e-7)
    engine = mtml.MAML(perceptron(), 0.1)
    with pytest.raises(RuntimeError, match="general"):
        engine.hvp(x, y, vectors(engine))["3.bias"].sum().backward()
    with torch.no_grad():
        assert not engine.hvp(x, y, vectors(engine))["3.bias"].requires_grad


def test_options_and_model_are_followed_and_copies_have_their_own() -> None:
    maml, (x, y) = mtml.MAML(perceptron(), 0.1), data()
    v = vectors(maml)
    before = maml.hvp(x, y, v)
    others = [copy.deepcopy(maml), pickle.loads(pickle.dumps(maml)), maml.clone()]
    with torch.no_grad():
        maml.module[3].weight.mul_(2.0)
    assert not torch.allclose(maml.hvp(x, y, v)["3.bias"], before["3.bias"])
    for other in others[:2]:
        torch.testing.assert_close(other.hvp(x, y, v), before)
    with torch.no_grad():
        maml.module[3].weight.mul_(0.5)
    maml.loss = nn.CrossEntropyLoss(reduction="sum")
    found = maml.hvp(x, y, v)
    torch.testing.assert_close(found, {n: S * h for n, h in before.items()})
    maml.params = "3.*"
    with pytest.raises(ValueError, match=r"vectors: expected names of adapted tensors, 3.weight, 3.bias; got"):
        maml.hvp(x, y, v)


def test_rows_for_every_step_are_read_at_the_first() -> None:
    maml, (x, y) = mtml.MAML(conv(), 0.1, steps=3, batch_norm="per_step"), data()
    plain = mtml.MAML(conv(), 0.1, batch_norm="batch")
    plain.module.load_state_dict(
        {n: t[0] if n in ("1.weight", "1.bias") else t for n, t in maml.module.state_dict().items()}, strict=False
    )
    v = {n: torch.randn(T, *p.shape, dtype=D) for n, p in maml.module.named_parameters() if not n.startswith("1.")}
    with torch.no_grad():
        maml.module[1].weight[1:] = 7.0
    torch.testing.assert_close(maml.hvp(x, y, v), plain.hvp(x, y, v))


@pytest.mark.parametrize("backend", ["auto", "general"])
def test_inference_mode(backend: str) -> None:
    maml, (x, y) = mtml.MAML(perceptron(), 0.1, backend=backend), data()
    v = vectors(maml)
    with torch.no_grad():
        wanted = maml.hvp(x, y, v)
    with torch.inference_mode():
        found = maml.hvp(x.clone(), y, {n: t.clone() for n, t in v.items()})
    torch.testing.assert_close(found, wanted)


def test_running_statistics_stay() -> None:
    maml, (x, y) = mtml.MAML(conv(), 0.1, batch_norm="track"), data()
    plain = mtml.MAML(copy.deepcopy(maml.module), 0.1)
    v = vectors(maml)
    torch.testing.assert_close(maml.hvp(x, y, v), plain.hvp(x, y, v))
    assert not maml.module[1].running_mean.any()


def test_the_same_paths_serve_all_calls() -> None:
    """Neither the first product nor later ones make the learner look at its model anew."""
    maml, (x, y) = mtml.MAML(perceptron(), 0.1), data()
    maml.meta_loss(x, y, x, y)
    finder, v = maml._paths.now, vectors(maml)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.hvp(x, y, v)
        learner = maml._long_step()
        maml.hvp(x, y, v)
    assert maml._long_step() is learner and finder.fresh() and maml._paths.now is finder
