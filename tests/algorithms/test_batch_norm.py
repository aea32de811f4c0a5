"""MAML's batch_norm modes on the fused and the general path; MAML++'s rows for every step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients
from torch import Tensor, nn
from torch.func import functional_call

from mtml import MAML, FallbackWarning, InnerLR, MetaSGD, PerStepBatchNorm
from mtml_kernels.batch_norm import per_step_batch_norm
from mtml_kernels.ops.inner_loop import BACKENDS

BACKEND_NAMES = [*BACKENDS.available(), "general"]
on_every_path = pytest.mark.parametrize("backend", BACKEND_NAMES)
T, S, Q, STEPS = 2, 6, 5, 3


def network(**norm: Any) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 6), nn.BatchNorm1d(6, **norm), nn.Tanh(), nn.Linear(6, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model


def episodes() -> tuple[Tensor, ...]:
    x = torch.randn(T, S + Q, 1, 6, 6, dtype=torch.float64)
    y = torch.randint(3, (T, S + Q))
    return x[:, :S], y[:, :S], x[:, S:], y[:, S:]


def explained(maml: MAML, batch: tuple[Tensor, ...]) -> dict[str, Any]:
    return maml.explain(*batch).to_dict()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["module", "batch", "running"])
def test_paths_agree_and_leave_buffers_alone(mode: str, training: bool) -> None:
    model, batch = network().train(training), episodes()
    before = {name: b.clone() for name, b in model.named_buffers()}
    parameters = list(model.parameters())
    results = {}
    for backend in BACKEND_NAMES:
        maml = MAML(model, 0.1, steps=STEPS, batch_norm=mode, backend=backend)
        assert explained(maml, batch)["path"] == ("general" if backend == "general" else "fused")
        results[backend] = maml.meta_forward(*batch)
    expected = results["general"]
    for result in results.values():
        assert_same(result, expected, rtol=1e-8, atol=1e-9)
        found, want = gradients(result.loss, parameters), gradients(expected.loss, parameters)
        assert_same(found, want, rtol=1e-6, atol=1e-8)
    for name, buffer in model.named_buffers():
        assert_same(buffer, before[name])
    assert all(m.training == training and getattr(m, "track_running_stats", True) for m in model)


def test_modes_differ() -> None:
    model, batch = network(), episodes()
    by_batch, by_running = (MAML(model, 0.1, batch_norm=m, backend="reference") for m in ("batch", "running"))
    assert not torch.allclose(by_batch.meta_loss(*batch), by_running.meta_loss(*batch))


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
def test_track_takes_the_general_path_where_something_is_tracked() -> None:
    model, batch = network(), episodes()
    maml = MAML(model, 0.1, batch_norm="track")
    content = explained(maml, batch)
    assert content["path"] == "general" and any("batch_norm='track'" in reason for reason in content["reasons"])
    before = model[1].running_mean.clone()
    maml.meta_loss(*batch)
    assert not torch.equal(model[1].running_mean, before)
    model.eval()
    assert explained(MAML(model, 0.1, batch_norm="track", backend="reference"), batch)["path"] == "fused"


@on_every_path
def test_affine_parameters_are_adapted_or_not(backend: str) -> None:
    model, batch = network(), episodes()
    maml = MAML(model, 0.1, steps=2, params=["8.*", "1.weight"], backend=backend)
    adapted = maml.adapt_tasks(*batch[:2])
    assert set(adapted.params) == {"1.weight", "8.weight", "8.bias"}
    assert not torch.equal(adapted.params["1.weight"][0], model[1].weight)
    loss = maml.meta_loss(*batch).sum()
    assert all(g.any() for g in torch.autograd.grad(loss, [model[1].bias, model[6].weight]))


class Functional(nn.Module):
    """F.batch_norm in a forward of its own."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.layer, self.by_batch = nn.Linear(4, 3), training
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.layer(x), self.mean, self.var, training=self.by_batch)


@pytest.mark.parametrize("by_batch", [True, False])
def test_functional_batch_norm(by_batch: bool) -> None:
    model = Functional(by_batch).double()
    before = model.mean.clone()
    batch = tuple(torch.randn(T, n, w, dtype=torch.float64) for n, w in ((S, 4), (S, 3), (Q, 4), (Q, 3)))
    losses = []
    for backend in BACKEND_NAMES:
        maml = MAML(model, 0.1, steps=2, loss="mse", backend=backend)
        assert explained(maml, batch)["path"] == ("general" if backend == "general" else "fused")
        losses.append(maml.meta_loss(*batch))
    for loss in losses:
        assert_same(loss, losses[-1], rtol=1e-8)
    assert torch.equal(model.mean, before)


def test_what_is_refused() -> None:
    batch = tuple(torch.randn(T, n, w, dtype=torch.float64) for n, w in ((S, 4), (S, 3), (Q, 4), (Q, 3)))
    model = Functional(False).double()
    content = explained(MAML(model, 0.1, loss="mse", params=["mean", "layer.*"]), batch)
    assert "mean: a running statistic" in content["reasons"][0]
    single = tuple(t[:, :1] for t in batch)
    with pytest.raises(ValueError, match="more than 1 value per channel"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        MAML(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), 0.1, loss="mse").meta_loss(*single)
    with pytest.raises(ValueError, match="layer '0' is a SyncBatchNorm"):
        MAML(nn.Sequential(nn.SyncBatchNorm(3)), 0.1, batch_norm="per_step")


# Rows for every step


def per_step(model: nn.Module, backend: str = "auto", **options: Any) -> MAML:
    """A MAML whose rows all differ."""
    maml = MAML(model, 0.1, steps=STEPS, batch_norm="per_step", backend=backend, **options)
    with torch.no_grad():
        for name, parameter in maml.module.named_parameters():
            if name.split(".")[0] in ("1", "6"):
                parameter += 0.3 * torch.randn_like(parameter)
    return maml


def plain(maml: MAML, batch: tuple[Tensor, ...], steps: int) -> Tensor:
    """The losses by ordinary layers, given the row of each pass."""
    ordinary = network(track_running_stats=False)
    tensors = dict(maml.module.named_parameters())
    rows = {n: p for n, p in tensors.items() if n.split(".")[0] in ("1", "6")}
    start = {n: p for n, p in tensors.items() if n not in rows}

    def loss(theta: dict[str, Tensor], row: int, x: Tensor, y: Tensor) -> Tensor:
        row = min(row, STEPS - 1)
        return F.cross_entropy(functional_call(ordinary, {**theta, **{n: p[row] for n, p in rows.items()}}, (x,)), y)

    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        theta = start
        for k in range(steps):
            grads = torch.autograd.grad(loss(theta, k, sx, sy), list(theta.values()), create_graph=True)
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
        losses.append(loss(theta, max(steps - 1, 0), qx, qy))
    return torch.stack(losses)


@on_every_path
@pytest.mark.parametrize("steps", [0, 1, STEPS, STEPS + 2])
def test_per_step_equals_the_plain_loop(backend: str, steps: int) -> None:
    maml, batch = per_step(network(), backend), episodes()
    assert explained(maml, batch)["path"] == ("general" if backend == "general" else "fused")
    found, expected = maml.meta_loss(*batch, steps=steps), plain(maml, batch, steps)
    assert_same(found, expected, rtol=1e-8, atol=1e-9)
    parameters = list(maml.module.parameters())
    assert_same(gradients(found, parameters), gradients(expected, parameters), rtol=1e-6, atol=1e-8)
    if steps == STEPS:
        norm = maml.module[1]
        assert torch.autograd.grad(found.sum(), norm.weight)[0].any(1).all()  # every row learns


def test_layers_are_replaced() -> None:
    model = network()
    model[1].weight.requires_grad_(False)
    weight, bias = model[1].weight, model[1].bias
    maml = per_step(model)
    assert maml.module is model and all(isinstance(model[i], PerStepBatchNorm) for i in (1, 6))
    assert model[1].weight.shape == (STEPS, 4) and not model[1].weight.requires_grad and model[1].bias.requires_grad
    again = MAML(network(), 0.1, steps=STEPS, batch_norm="per_step").module[1]
    assert torch.equal(again.weight[0], again.weight[-1])
    assert (weight.shape, bias.shape) == ((4,), (4,))
    assert "module.1.weight" in maml.state_dict()
    shared = nn.BatchNorm1d(3)
    twice = per_step_batch_norm(nn.Sequential(shared, nn.ReLU(), shared), 2)
    assert twice[0] is twice[2]
    assert isinstance(per_step_batch_norm(shared, 0), PerStepBatchNorm)


def test_a_layer_outside_the_loop_reads_its_last_row() -> None:
    layer, x = PerStepBatchNorm(3, steps=4).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    assert_same(layer(x), F.batch_norm(x, None, None, layer.weight[3], layer.bias[3], training=True))
    assert repr(layer) == "PerStepBatchNorm(3, steps=4)"
    assert PerStepBatchNorm(3, 1, affine=False).weight is None
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        PerStepBatchNorm(3, 0)


@on_every_path
def test_adapted_models_read_the_row_of_their_step(backend: str) -> None:
    maml, batch = per_step(network(), backend), episodes()
    adapted = maml.adapt_tasks(*batch[:2], keep_steps=True)
    assert not any(name.startswith(("1.", "6.")) for name in adapted.params)
    for step in range(STEPS + 1):
        assert_same(adapted.loss(batch[2], batch[3], step=step), plain(maml, batch, step), rtol=1e-8, atol=1e-9)
        assert_same(adapted.task(1, step)(batch[2][1]), adapted(batch[2], step)[1], rtol=1e-8, atol=1e-9)


def test_the_per_task_loop_reads_the_row_of_its_step() -> None:
    maml, batch = per_step(network()), episodes()
    losses = []
    for sx, sy, qx, qy in zip(*batch, strict=True):
        learner = maml.clone()
        for _ in range(STEPS):
            learner.adapt(F.cross_entropy(learner(sx), sy))
        losses.append(F.cross_entropy(learner(qx), qy))
    found, expected = torch.stack(losses), plain(maml, batch, STEPS)
    assert_same(found, expected)
    parameters = list(maml.module.parameters())
    assert_same(gradients(found, parameters), gradients(expected, parameters), rtol=1e-8, atol=1e-9)


def test_rows_are_never_adapted() -> None:
    maml = per_step(network())
    rates = InnerLR(maml.module, 0.1, per="tensor")
    assert set(rates.shapes) == {"0.weight", "0.bias", "5.weight", "5.bias", "8.weight", "8.bias"}
    assert len(MetaSGD(network(), 0.1, batch_norm="per_step").lrs) == 6
    with pytest.raises(ValueError, match=r"'1.weight' matches no floating-point parameter"):
        MAML(maml.module, 0.1, params="1.weight")
