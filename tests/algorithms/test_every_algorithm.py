"""What holds for every algorithm: the meta-gradient against finite differences, tasks alone, copies, batches."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases.algorithms import APPROXIMATE, EVERY, EXACT, C, Q, T, batch, made
from torch import Tensor

from mtml.tasks import TaskBatch


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
