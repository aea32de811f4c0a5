"""What task_map fuses equals its loop to second order; what only looks alike is not fused; changes are followed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.task_bodies import batch, by_autograd, by_func, gradients, network, way_of
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

import mtml


def steps(model: nn.Module, params: Any, rates: Any, data: Any, changed: Any = lambda g: g) -> Tensor:
    """An inner loop whose start and rates are given: a list of {name: rate}, or of rates."""
    sx, sy, qx, qy = data
    for rate in rates:
        inner = F.mse_loss(functional_call(model, params, sx), sy)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        of = rate if isinstance(rate, dict) else dict.fromkeys(params, rate)
        params = {n: p - of[n] * changed(g) for (n, p), g in zip(params.items(), grads, strict=True)}
    return F.mse_loss(functional_call(model, params, qx), qy)


def check_fused(fn: Any, data: Any, leaves: Any, in_dims: Any = 0) -> mtml.TaskMapExplanation:
    """The function is fused, and equals its loop in value and gradients."""
    mapped, loop = mtml.task_map(fn, in_dims), mtml.task_map(fn, in_dims, way="loop")
    explained = mapped.explain(*data)
    assert explained.way == "fused", explained
    found, expected = mapped(*data), loop(*data)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    return explained


@pytest.mark.parametrize("make", [by_autograd, by_func])
def test_the_idioms(make: Any) -> None:
    model, data = network(), batch()
    data[0].requires_grad_()
    data[3].requires_grad_()
    explained = check_fused(make(model), data, [*model.parameters(), data[0], data[3]])
    words = "gradient descent of Sequential, 2 steps, exact second order, loss mse, adapts 4 tensors"
    assert explained.recognised == words and words in str(explained)
    assert explained.to_dict()["engine"]["path"] == "fused"


def test_second_order_is_there_and_first_is_told_from_it() -> None:
    """A negative control: the two differ, so that the other tests can tell."""
    model, data = network(), batch()
    leaves = list(model.parameters())
    first = by_autograd(model, second_order=False)
    assert "first order" in check_fused(first, data, leaves).recognised
    one, two = (gradients(mtml.task_map(fn)(*data), leaves) for fn in (first, by_autograd(model)))
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, two, strict=True))


def test_clone_and_adapt() -> None:
    model, data = network(), batch()
    maml = mtml.MAML(model, lr=0.1)

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.mse_loss(learner(sx), sy))
        return F.mse_loss(learner(qx), qy)

    check_fused(task, data, list(model.parameters()))


@pytest.mark.parametrize(
    ("loss", "classes", "words"),
    [
        (F.cross_entropy, 3, "loss cross_entropy"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 3, "label_smoothing=0.1"),
        (nn.MSELoss(reduction="sum"), 0, "sum"),
        (nn.HuberLoss(delta=0.5), 0, "huber(delta=0.5)"),
        (lambda output, target: 0.5 * ((output - target) ** 2).mean(), 0, "(query: 0.5 x mse)"),
    ],
)
def test_losses(loss: Any, classes: int, words: str) -> None:
    model, data = network(), batch(classes=classes)
    assert words in check_fused(by_autograd(model, lr=0.02, loss=loss), data, list(model.parameters())).recognised


def test_rates_of_every_kind() -> None:
    model, data = network(), batch()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    scalar = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    row = nn.Parameter(torch.tensor([0.1, 0.05], dtype=torch.float64))
    logs = {n: nn.Parameter(torch.full(s, -2.0, dtype=torch.float64)) for n, s in shapes.items()}
    leaves = [*model.parameters(), scalar, row, *logs.values()]

    def own() -> dict[str, Tensor]:
        return dict(model.named_parameters())

    numbers = {n: 0.1 / (at + 1) for at, n in enumerate(shapes)}
    check_fused(lambda *data: steps(model, own(), [0.1, 0.05, 0.2], data), data, leaves)
    check_fused(lambda *data: steps(model, own(), [numbers, numbers], data), data, leaves)
    check_fused(lambda *data: steps(model, own(), [numbers, 0.3], data), data, leaves)
    check_fused(lambda *data: steps(model, own(), [scalar, scalar], data), data, leaves)
    check_fused(lambda *data: steps(model, own(), [row[0], row[1]], data), data, leaves)
    check_fused(lambda *data: steps(model, own(), [{n: a.exp() for n, a in logs.items()}] * 2, data), data, leaves)
    check_fused(lambda lr, *data: steps(model, own(), [lr, lr], data), [scalar, *data], leaves, (None, 0, 0, 0, 0))


def test_starts_of_every_kind() -> None:
    model, data = network(), batch()
    own = dict(model.named_parameters())
    others = {n: (p.detach() + 0.1).requires_grad_() for n, p in own.items()}
    each = {
        n: (p.detach() + 0.1 * torch.randn(4, *p.shape, dtype=torch.float64)).requires_grad_() for n, p in own.items()
    }
    leaves = [*own.values(), *others.values(), *each.values()]

    def task(params: dict[str, Tensor], *data: Tensor) -> Tensor:
        return steps(model, params, [0.1, 0.1], data)

    shared = (None, 0, 0, 0, 0)
    check_fused(task, [own, *data], leaves, shared)
    check_fused(task, [others, *data], leaves, shared)
    check_fused(task, [each, *data], leaves)
    check_fused(lambda *data: task(others, *data), data, leaves)
    mapped = mtml.task_map(task, shared)  # the module's own first, then others with the same signature
    for params in (own, others, own):
        assert torch.allclose(mapped(params, *data), mtml.task_map(task, shared, way="loop")(params, *data))


def test_some_tensors_only() -> None:
    model, data = network(), batch()

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        head = {n: p for n, p in model.named_parameters() if n.startswith("2.")}
        grads, _ = grad_and_value(lambda h: F.mse_loss(functional_call(model, h, (sx,)), sy))(head)
        return F.mse_loss(functional_call(model, {n: head[n] - 0.1 * grads[n] for n in head}, (qx,)), qy)

    assert "adapts 2 tensors" in check_fused(task, data, list(model.parameters())).recognised


def test_task_batch_and_images() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(48, 3)).double()
    task = by_func(model, loss=F.cross_entropy)
    x, y = torch.randn(4, 5, 1, 6, 6, dtype=torch.float64), torch.randint(3, (4, 5))
    check_fused(lambda b: task(b.sx, b.sy, b.qx, b.qy), [mtml.TaskBatch(x, y, x + 0.1, y)], list(model.parameters()))


@dataclasses.dataclass
class Learner:
    model: nn.Module
    lr: float

    def task(self, *data: Tensor) -> Tensor:
        return by_autograd(self.model, self.lr)(*data)


# --- what is not fused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (lambda g: g.clamp(-100.0, 100.0), "'clamp'"),  # which does nothing on these numbers
        (lambda g: g / g.norm(), "'norm'"),
        (lambda g: g * g, "not gradient descent"),
        (lambda g: g + 0.0001, "not gradient descent"),
        (lambda g: g.detach(), "'detach'"),
    ],
)
def test_steps_that_look_alike(changed: Any, why: str) -> None:
    model, data = network(), batch()
    mapped = mtml.task_map(lambda *data: steps(model, dict(model.named_parameters()), [0.1], data, changed))
    explained = mapped.explain(*data)
    assert explained.way == "loop" and why in explained.not_fused


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda o, t: F.mse_loss(o, t) + 1e-6 * o.pow(4).mean(), "loss:"),
        (lambda o, t: F.mse_loss(2.0 * o, t), "loss:"),
        (lambda o, t: torch.where(o.abs() < 100.0, (o - t) ** 2, o).mean(), "'abs'|'where'|'lt'|'__lt__'"),
        (lambda o, t: F.mse_loss(o, t) if o.sum() > -1e9 else o.sum(), "value of a tensor|'gt'"),
    ],
)
def test_losses_that_look_alike(loss: Any, why: str) -> None:
    model, data = network(), batch()
    explained = mtml.task_map(by_autograd(model, loss=loss)).explain(*data)
    assert explained.way == "loop"
    assert any(part.strip("'") in explained.not_fused for part in why.split("|")), explained.not_fused


def test_other_data_than_the_arguments() -> None:
    model, data = network(), batch()
    task = by_autograd(model)
    for fn in (
        lambda sx, sy, qx, qy: task(2.0 * sx, sy, qx, qy),
        lambda sx, sy, qx, qy: task(sx, sy, qx, qy) + F.mse_loss(model(sx), sy),
        lambda sx, sy, qx, qy: task(sx, sy, torch.ones(6, 2, dtype=torch.float64), qy),
    ):
        mapped = mtml.task_map(fn)
        assert way_of(mapped, *data) == "loop"
        assert torch.allclose(mapped(*data), mtml.task_map(fn, way="loop")(*data))


def test_a_model_that_is_not_fused_runs_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Hardshrink()).double()
    explained = mtml.task_map(by_func(model)).explain(*batch())
    assert explained.way in ("vmap", "loop") and "Hardshrink" in explained.not_fused


# --- changes between calls --------------------------------------------------------------------------------------------

RATE = 0.1


def global_rate(model: nn.Module) -> Any:
    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        return by_autograd(model, RATE)(sx, sy, qx, qy)

    return task


def check_followed(fn: Any, data: Any, change: Any) -> None:
    mapped, loop = mtml.task_map(fn), mtml.task_map(fn, way="loop")
    assert way_of(mapped, *data) == "fused"
    before = mapped(*data)
    change()
    after = mapped(*data)
    assert not torch.allclose(before, after, rtol=1e-4)
    assert torch.allclose(after, loop(*data), rtol=1e-9)


def test_changed_constants_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), batch()
    check_followed(global_rate(model), data, lambda: monkeypatch.setitem(globals(), "RATE", 0.7))
    learner = Learner(model, 0.1)
    check_followed(learner.task, data, lambda: setattr(learner, "lr", 0.7))
    rates = [0.1, 0.1]
    own = dict(model.named_parameters())
    check_followed(lambda *d: steps(model, own, rates, d), data, lambda: rates.append(0.1))
    loss = nn.HuberLoss(delta=5.0)
    check_followed(by_autograd(model, loss=loss), data, lambda: setattr(loss, "delta", 0.3))


def test_changed_tensors_are_followed() -> None:
    model, data = network(), batch()
    rate, target = torch.tensor(0.1, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64)
    task = by_autograd(model, rate)
    check_followed(task, data, lambda: rate.mul_(5.0))
    check_followed(lambda sx, sy, qx, qy: task(sx, sy, qx, target), data, lambda: target.add_(1.0))


def test_changed_models_are_followed() -> None:
    model, data = network(), batch()
    task = by_autograd(model)
    check_followed(task, data, lambda: nn.init.normal_(model[0].weight))
    check_followed(task, data, lambda: setattr(model[0], "weight", nn.Parameter(torch.randn(4, 2).double())))
    check_followed(task, data, lambda: model.__setitem__(1, nn.Sigmoid()))
    check_followed(task, data, lambda: model[1].register_forward_hook(lambda module, args, output: 2.0 * output))


def test_an_optimizer_does_not_undo_the_choice() -> None:
    model, data = network(), batch()
    mapped = mtml.task_map(by_autograd(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mapped(*data)
    choice = next(iter(mapped._choices.values()))
    for _ in range(3):
        optimizer.zero_grad()
        mapped(*data).mean().backward()
        optimizer.step()
    assert next(iter(mapped._choices.values())) is choice


def test_a_schedule_ends_in_the_loop() -> None:
    model, data = network(), batch()
    learner = Learner(model, 0.1)
    mapped, loop = mtml.task_map(learner.task), mtml.task_map(learner.task, way="loop")
    for at in range(8):
        learner.lr = 0.1 + 0.1 * at
        assert torch.allclose(mapped(*data), loop(*data), rtol=1e-9)
    assert "changes from call to call" in mapped.explain(*data).not_fused


def test_a_changed_rate_of_the_learner_is_followed() -> None:
    model, data = network(), batch()
    maml = mtml.MAML(model, lr=0.1)

    def task(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        learner = maml.clone()
        learner.adapt(F.mse_loss(learner(sx), sy))
        return F.mse_loss(learner(qx), qy)

    check_followed(task, data, lambda: setattr(maml, "lr", 0.5))
    maml.lr = rates = {n: 0.1 for n, _ in model.named_parameters()}
    check_followed(task, data, lambda: rates.update(dict.fromkeys(rates, 0.5)))


def test_arguments_in_several_places() -> None:
    model, data = network(), batch()
    one, two = (torch.tensor(rate, dtype=torch.float64) for rate in (0.1, 0.5))
    own = dict(model.named_parameters())

    def task(a: Tensor, b: Tensor, *data: Tensor) -> Tensor:
        return steps(model, own, [a, b], data)

    def closed(a: Tensor, *data: Tensor) -> Tensor:
        return steps(model, own, [one, one], data) + 0.0 * a

    mapped, dims = mtml.task_map(task, (None, None, 0, 0, 0, 0)), (None, 0, 0, 0, 0)
    for rates in ((one, one), (one, two), (two, one)):
        expected = torch.stack([task(*rates, *row) for row in zip(*data, strict=True)])
        assert torch.allclose(mapped(*rates, *data), expected, rtol=1e-9)
    mapped = mtml.task_map(closed, dims)
    assert torch.allclose(mapped(one, *data), mapped(two, *data))


def test_objects_among_the_arguments_are_not_trusted() -> None:
    model, data = network(), batch()
    learner = Learner(model, 0.1)
    mapped = mtml.task_map(lambda given, *data: given.task(*data), (None, 0, 0, 0, 0))
    assert "takes a Learner" in mapped.explain(learner, *data).not_fused
    learner.lr = 0.5
    assert torch.allclose(mapped(learner, *data), mtml.task_map(learner.task, way="loop")(*data))


def test_modules_that_look_up_layers_by_computed_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer0, self.layer1, self.scale = nn.Linear(2, 4), nn.Linear(4, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            for at in range(2):
                x = getattr(self, f"layer{at}")(torch.tanh(x))
            return self.scale * x

    model, data = Net().double(), batch()
    check_followed(by_autograd(model), data, lambda: setattr(model, "scale", 2.0))


def test_hooks_on_parameters_see_inner_gradients() -> None:
    model, data = network(), batch()
    task, hooks = by_autograd(model), []
    check_followed(task, data, lambda: hooks.append(model[0].weight.register_hook(lambda g: 10.0 * g)))
    assert "hook" in mtml.task_map(task).explain(*data).not_fused
    hooks.pop().remove()
    assert way_of(mtml.task_map(task), *data) == "fused"


@pytest.mark.parametrize("seed", range(6))
def test_random_bodies(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    width, depth, steps_ = one_of(1, 3, 8), one_of(0, 1, 2), one_of(1, 2, 3)
    act = one_of(nn.Tanh, nn.Sigmoid, nn.Softplus)
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), act())]
    model = nn.Sequential(nn.Linear(2, width), act(), *layers, nn.Linear(width, 3)).double()
    classes = one_of(0, 3)
    loss = (
        F.cross_entropy if classes else one_of(F.mse_loss, nn.HuberLoss(delta=0.7), lambda o, t: (o - t).pow(2).sum())
    )
    rate = one_of(0.01, 0.05, nn.Parameter(torch.tensor(0.02, dtype=torch.float64)))
    make = one_of(by_autograd, by_func)
    data = batch(one_of(2, 5), classes)
    leaves = [*model.parameters(), *([rate] if isinstance(rate, Tensor) else [])]
    check_fused(make(model, rate, steps_, loss), data, leaves)
