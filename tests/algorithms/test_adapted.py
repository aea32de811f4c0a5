"""mtml.Adapted: adapted models as functions and as modules, differentiable back to everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, classification, gradients, mlp, oracle, regression
from torch import Tensor, nn

from mtml import MAML, InnerLR, TaskBatch
from mtml_kernels.ops.inner_loop import BACKENDS

every_path = pytest.mark.parametrize("backend", ["general", *BACKENDS.available()])


@every_path
@pytest.mark.parametrize("first_order", [False, True])
def test_values_and_gradients(backend: str, first_order: bool) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=3, loss="mse", backend=backend)
    adapted = maml.adapt_tasks(*batch[:2], first_order=first_order)
    want = oracle(model, batch, F.mse_loss, 0.1, 3, first_order=first_order)
    assert list(adapted.params) == [name for name, _ in model.named_parameters()]
    for name, value in want.trajectory[-1].items():
        assert_same(adapted.params[name], value)
    assert_same(adapted.support_losses, want.support_losses)
    assert_same(adapted(batch[2]), want.output)
    assert_same(adapted.loss(*batch[2:]), want.loss)
    assert_same(adapted.loss(TaskBatch(*batch)), want.loss)
    parameters = list(model.parameters())
    assert_same(gradients(adapted.loss(*batch[2:]), parameters), gradients(want.loss, parameters))
    assert_same(gradients(adapted.support_losses, parameters), gradients(want.support_losses, parameters))


@every_path
def test_every_step_is_kept(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, loss="mse", backend=backend)
    adapted = maml.adapt_tasks(*batch[:2], steps=2, keep_steps=True)
    want = oracle(model, batch, F.mse_loss, 0.1, 2)
    parameters = list(model.parameters())
    for step in (0, 1, 2, -1, -2, -3):
        for name, value in want.trajectory[step].items():
            assert_same(adapted.params_at(step)[name], value)
    shorter = oracle(model, batch, F.mse_loss, 0.1, 1)
    assert_same(adapted(batch[2], step=1), shorter.output)
    got = adapted.loss(*batch[2:], step=1)
    assert_same(gradients(got, parameters), gradients(shorter.loss, parameters))
    with pytest.raises(IndexError, match=r"step: expected -3 .. 2"):
        adapted(batch[2], step=3)
    last = maml.adapt_tasks(*batch[:2], steps=2)
    assert_same(last(batch[2], step=2), adapted(batch[2]))
    with pytest.raises(ValueError, match="keep_steps=True"):
        last(batch[2], step=0)


@every_path
def test_differentiable_to_rates_inputs_and_untouched_parameters(backend: str) -> None:
    model = mlp(3, 6, 2)
    sx, sy, qx, qy = regression()
    lr = InnerLR(model, 0.1, per="tensor", steps=2, params="2.*")
    maml = MAML(model, lr, steps=2, loss="mse", params="2.*", backend=backend)
    sx.requires_grad_()
    adapted = maml.adapt_tasks(sx, sy)
    table = lr.as_dict()
    want = oracle(model, (sx, sy, qx, qy), F.mse_loss, lambda n, k: table[n][k], 2, ["2.weight", "2.bias"])
    leaves = [sx, *maml.parameters()]
    assert_same(gradients(adapted.loss(qx, qy), leaves), gradients(want.loss, leaves))


@every_path
def test_detach_and_no_grad(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    adapted = maml.adapt_tasks(*batch[:2], keep_steps=True)
    cut = adapted.detach()
    assert not any(p.requires_grad for p in cut.params.values()) and not cut.support_losses.requires_grad
    assert_same(cut(batch[2], step=1), adapted(batch[2], step=1))
    with torch.no_grad():
        other = maml.adapt_tasks(*batch[:2])
    assert not any(p.requires_grad for p in other.params.values())
    assert_same(other.params["0.weight"], adapted.params["0.weight"])


@every_path
def test_a_task_as_a_module(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    adapted = MAML(model, 0.1, steps=2, loss="mse", backend=backend).adapt_tasks(*batch[:2])
    module = adapted.task(1)
    assert type(module) is type(model)
    assert_same(module(batch[2][1]), adapted(batch[2])[1])
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in module.parameters())
    assert not torch.equal(next(module.parameters()), next(model.parameters()))
    with pytest.raises(IndexError, match="t: expected a task below 3"):
        adapted.task(3)
    first = MAML(model, 0.1, loss="mse", backend=backend).adapt_tasks(*batch[:2], keep_steps=True).task(-1, step=0)
    assert_same(first(batch[2][0]), model(batch[2][0]))


@every_path
def test_nothing_aliases_the_model(backend: str) -> None:
    model, batch = mlp(3, 6, 2), regression()
    maml = MAML(model, 0.1, steps=0, loss="mse", params="2.weight", backend=backend)
    with torch.no_grad():
        value = maml.adapt_tasks(*batch[:2]).params["2.weight"]
        before = model[2].weight.clone()
        value.zero_()
    assert torch.equal(model[2].weight, before)


@every_path
def test_masks(backend: str) -> None:
    model, batch = mlp(3, 6, 4), classification()
    masks = tuple(torch.rand(3, n, dtype=torch.float64) for n in (5, 4))
    adapted = MAML(model, 0.1, steps=2, backend=backend).adapt_tasks(*batch[:2], support_mask=masks[0])
    want = oracle(model, batch, F.cross_entropy, 0.1, 2, masks=masks)
    assert_same(adapted.loss(*batch[2:], query_mask=masks[1]), want.loss)
    assert_same(adapted.loss(TaskBatch(*batch, *masks)), want.loss)


def test_bad_queries() -> None:
    adapted = MAML(mlp(3, 6, 4), 0.1).adapt_tasks(*classification()[:2])
    sx, sy = classification()[:2]
    with pytest.raises(ValueError, match=r"x: expected \[T, N, ...\] with T = 3"):
        adapted(sx[:2])
    with pytest.raises(ValueError, match="qy: expected class ids in"):
        adapted.loss(sx, torch.full_like(sy, 4))
    with pytest.raises(TypeError, match="qy: expected integer class ids"):
        adapted.loss(sx, sy.double())
    with pytest.raises(ValueError, match="qy: expected class ids of shape"):
        adapted.loss(sx, sy[:, :2])


def test_stateful_and_unbatchable_models() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2.0 if float(self.layer(x).detach().sum()) > 1e9 else 1.0)

    model, batch = Odd().double(), regression()
    adapted = MAML(model, 0.1, steps=2, loss="mse", backend="general").adapt_tasks(*batch[:2])
    want = oracle(model, batch, F.mse_loss, 0.1, 2)
    assert_same(adapted(batch[2]), want.output)


def test_an_opaque_loss() -> None:
    def loss(output: Tensor, target: Tensor) -> Any:
        return (output - target).abs().pow(1.5).mean()

    model, batch = mlp(3, 6, 2), regression()
    adapted = MAML(model, 0.1, loss=loss, backend="general").adapt_tasks(*batch[:2])
    assert_same(adapted.loss(*batch[2:]), oracle(model, batch, loss, 0.1, 1).loss)
