"""Differentiable optimizers of mtml.compat.torchopt: values and meta-gradients against loops written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtml.compat import torchopt

Rule = Callable[[Tensor, Tensor, dict[str, Any], int], Tensor]  # (parameter, gradient, its state, t) -> parameter


def net_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sgd(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    g = g + 0.02 * p
    s["b"] = g if t == 1 else 0.9 * s["b"] + 0.7 * g
    return p - 0.1 * s["b"]


def nesterov(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["b"] = g if t == 1 else 0.8 * s["b"] + g
    return p - 0.1 * (g + 0.8 * s["b"])


def ascent(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    return p - 0.1 * (-g + 0.02 * p)


def moments(g: Tensor, s: dict[str, Any], b1: float = 0.9, b2: float = 0.99) -> tuple[Tensor, Tensor]:
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    return s["m"], s["v"]


def adam(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    m, v = moments(g + 0.02 * p, s)
    return p - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t) + 1e-4).sqrt() + 1e-3)


def adamw(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    m, v = moments(g, s)
    return p - 0.1 * ((m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8) + 0.3 * p)


def adamax(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * g
    s["n"] = g.abs() + 1e-3 if t == 1 else torch.maximum(0.99 * s["n"], g.abs() + 1e-3)
    return p - 0.1 * s["m"] / s["n"] / (1 - 0.9**t)


def radam(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    m, v = moments(g, s)
    m, limit = m / (1 - 0.9**t), 2 / (1 - 0.99) - 1
    length = limit - 2 * t * 0.99**t / (1 - 0.99**t)
    if length <= 5:
        return p - 0.1 * m
    r = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
    return p - 0.1 * r * m * math.sqrt(1 - 0.99**t) / (v.sqrt() + 1e-8)


def adadelta(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["v"] = 0.8 * s.get("v", 0.0) + 0.2 * g**2
    change = g * torch.sqrt((s.get("d", 0.0) + 1e-3) / (s["v"] + 1e-3))
    s["d"] = 0.8 * s.get("d", 0.0) + 0.2 * change**2
    return p - 0.5 * change


def adagrad(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["v"] = s.get("v", 0.1) + g**2
    return p - 0.1 / (1 + 0.05 * (t - 1)) * g / (s["v"].sqrt() + 1e-10)


def rmsprop(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["v"] = 0.9 * s.get("v", 0.0) + 0.1 * g**2
    s["b"] = 0.5 * s.get("b", 0.0) + g / (s["v"].sqrt() + 1e-8)
    return p - 0.01 * s["b"]


def centered(p: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["a"], s["v"] = 0.9 * s.get("a", 0.0) + 0.1 * g, 0.9 * s.get("v", 0.0) + 0.1 * g**2
    return p - 0.01 * g / ((s["v"] - s["a"] ** 2).sqrt() + 1e-2)


B = (0.9, 0.99)
CASES: dict[str, tuple[Rule, Callable[[nn.Module], Any]]] = {
    "plain": (lambda p, g, s, t: p - 0.1 * g, lambda net: torchopt.MetaSGD(net, 0.1)),
    "ascent": (ascent, lambda net: torchopt.MetaSGD(net, 0.1, weight_decay=0.02, maximize=True)),
    "sgd": (sgd, lambda net: torchopt.MetaSGD(net, 0.1, momentum=0.9, weight_decay=0.02, dampening=0.3)),
    "nesterov": (nesterov, lambda net: torchopt.MetaSGD(net, 0.1, 0.8, nesterov=True)),
    "adam": (adam, lambda net: torchopt.MetaAdam(net, 0.1, B, 1e-3, 0.02, eps_root=1e-4)),
    "accelerated": (adam, lambda n: torchopt.MetaAdam(n, 0.1, B, 1e-3, 0.02, eps_root=1e-4, use_accelerated_op=True)),
    "adamw": (adamw, lambda net: torchopt.MetaAdamW(net, 0.1, B, weight_decay=0.3)),
    "adamax": (adamax, lambda net: torchopt.MetaAdaMax(net, 0.1, B, 1e-3)),
    "radam": (radam, lambda net: torchopt.MetaRAdam(net, 0.1, B)),
    "adadelta": (adadelta, lambda net: torchopt.MetaAdaDelta(net, 0.5, 0.8, 1e-3)),
    "adagrad": (adagrad, lambda net: torchopt.MetaAdaGrad(net, 0.1, 0.05, initial_accumulator_value=0.1)),
    "rmsprop": (rmsprop, lambda net: torchopt.MetaRMSProp(net, 0.01, 0.9, momentum=0.5)),
    "centered": (centered, lambda net: torchopt.MetaRMSprop(net, 0.01, 0.9, 1e-2, centered=True)),
}


def plain_loop(net: nn.Module, rule: Rule, x: Tensor, steps: int, second_order: bool = True) -> list[Tensor]:
    """[the loss after the steps, its gradients by the first parameters]."""
    first = dict(net.named_parameters())
    theta: dict[str, Tensor] = dict(first)
    states: dict[str, dict[str, Any]] = {name: {} for name in first}
    for t in range(1, steps + 1):
        loss = functional_call(net, theta, (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=second_order)
        found = zip(theta.items(), grads, strict=True)
        theta = {name: rule(p, g, states[name], t) for (name, p), g in found}
    loss = functional_call(net, theta, (x + 0.1,)).square().mean()
    return [loss, *torch.autograd.grad(loss, list(first.values()))]


def our_loop(net: nn.Module, optimizer: Any, x: Tensor, steps: int) -> list[Tensor]:
    first = list(net.parameters())
    for _ in range(steps):
        optimizer.step(net(x).square().mean())
    loss = net(x + 0.1).square().mean()
    return [loss, *torch.autograd.grad(loss, first)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_meta_gradients_are_those_of_a_plain_loop(name: str) -> None:
    rule, make = CASES[name]
    steps = 7 if name == "radam" else 3  # its sixth step is the first that is adaptive
    expected = plain_loop(net_of(), rule, data(8), steps)
    net = net_of()
    optimizer = make(net)
    for _ in range(2):  # the same again, once both have their states of before
        states = torchopt.extract_state_dict(net), torchopt.extract_state_dict(optimizer)
        torch.testing.assert_close(our_loop(net, optimizer, data(8), steps), expected, rtol=1e-9, atol=1e-12)
        torchopt.recover_state_dict(net, states[0])
        torchopt.recover_state_dict(optimizer, states[1])


@pytest.mark.parametrize("name", CASES)
def test_first_order_is_something_else(name: str) -> None:
    rule, _ = CASES[name]
    x, steps = data(8), 7 if name == "radam" else 3
    exact, first = (plain_loop(net_of(), rule, x, steps, second_order=order) for order in (True, False))
    assert max((a - b).abs().max().item() for a, b in zip(exact, first, strict=True)) > 1e-5


def test_differentiable_any_number_of_times() -> None:
    net = nn.Linear(2, 1).double()
    x = data(4)[:, :2]

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        net._parameters["weight"], net._parameters["bias"] = weight, bias  # type: ignore[assignment]
        optimizer = torchopt.MetaAdam(net, 0.1, eps_root=1e-4)
        for _ in range(2):
            optimizer.step(net(x).pow(4).mean())
        return net(x).pow(4).mean()

    inputs = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs, atol=1e-4)


def test_a_gradient_of_zero_leaves_no_nan() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[0].bias[0] = -100.0  # a unit that is off
    for kind in (torchopt.MetaAdam, torchopt.MetaAdaGrad, torchopt.MetaRMSProp, torchopt.MetaRAdam):
        state = torchopt.extract_state_dict(net)
        found = our_loop(net, kind(net, 0.01), data(8), 6)
        torchopt.recover_state_dict(net, state)
        assert all(tensor.isfinite().all() for tensor in found), kind


def test_a_learnt_rate_gets_its_gradient_and_is_followed() -> None:
    lr = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    net = net_of()
    first, state = list(net.parameters()), torchopt.extract_state_dict(net)
    optimizer = torchopt.MetaSGD(net, lr)
    for rate in (0.1, 0.3):  # the original keeps the rate that it was made with
        with torch.no_grad():
            lr.fill_(rate)
        loss = our_loop(net, optimizer, data(8), 2)[0]
        torchopt.recover_state_dict(net, state)
        expected = plain_loop(net_of(), lambda p, g, s, t, rate=rate: p - rate * g, data(8), 2)[0]
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    optimizer.step(net(data(8)).square().mean())
    grad = torch.autograd.grad(net(data(8)).square().mean(), [lr, *first])[0]
    assert grad < 0  # a larger step would lower the loss


def test_a_schedule_has_the_precision_of_the_model() -> None:
    schedule = torchopt.schedule.polynomial_schedule(0.1, 0.01, 2, transition_steps=3)
    rule: Rule = lambda p, g, s, t: p - ((0.1 - 0.01) * (1 - (t - 1) / 3) ** 2 + 0.01) * g  # noqa: E731
    net = net_of()
    found = our_loop(net, torchopt.MetaSGD(net, schedule), data(8), 3)
    torch.testing.assert_close(found, plain_loop(net_of(), rule, data(8), 3), rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_shared_parameters_stay_shared(by: str) -> None:
    torch.manual_seed(0)
    net = Tied().double()
    expected = plain_loop(net, lambda p, g, s, t: p - 0.1 * g, data(8), 3)
    torchopt.recover_state_dict(net, torchopt.extract_state_dict(net, by=by))
    found = our_loop(net, torchopt.MetaSGD(net, 0.1), data(8), 3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert net.a.weight is net.b.weight


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_compute_with_the_adapted_weights(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    net = kind(3, 4).double()

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)[0]

    x, theta = data(5, 2), dict(net.named_parameters())
    for _ in range(2):
        loss = functional_call(net, theta, (x,))[0].square().mean()
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {name: p - 0.5 * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    expected = functional_call(net, theta, (x,))[0].square().mean()
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    first, optimizer, state = list(net.parameters()), torchopt.MetaSGD(net, 0.5), torchopt.extract_state_dict(net)
    before = run(net, x).square().mean()
    for _ in range(2):
        optimizer.step(run(net, x).square().mean())
    loss = run(net, x).square().mean()
    torch.testing.assert_close([loss, *torch.autograd.grad(loss, first)], [expected, *gradients], rtol=1e-9, atol=1e-12)
    torchopt.recover_state_dict(net, state)
    assert torch.equal(run(net, x).square().mean(), before)


def test_what_has_no_gradient_stays() -> None:
    net = net_of()
    net[0].requires_grad_(False)
    net.spare = nn.Linear(1, 1).double()  # the loss does not depend on it
    names = {"0.weight", "0.bias", "spare.weight", "spare.bias"}
    before = dict(net.named_parameters())
    optimizer = torchopt.MetaAdamW(net, 0.1)
    for _ in range(2):
        optimizer.step(net[:3](data(8)).square().mean())
    assert {name for name, p in net.named_parameters() if p is before[name]} == names
    assert [int(count) for count in optimizer.state_dict()[0][0].count] == [0, 0, 2, 2, 0, 0]


def test_groups_are_stepped_together() -> None:
    expected = plain_loop(net_of(), adam, data(8), 3)
    net = net_of()
    optimizer = torchopt.MetaAdam(net[0], 0.1, B, 1e-3, 0.02, eps_root=1e-4)
    optimizer.add_param_group(net[2])
    torch.testing.assert_close(our_loop(net, optimizer, data(8), 3), expected, rtol=1e-9, atol=1e-12)
    assert len(optimizer.state_dict()) == 2


def test_moments_that_require_grad_are_leaves_that_get_one() -> None:
    net = net_of()
    for requires in (True, False):
        state, optimizer = torchopt.extract_state_dict(net), torchopt.MetaAdam(net, moment_requires_grad=requires)
        params = dict(net.named_parameters())
        order = [params[name] for name in ("0.bias", "0.weight", "2.bias", "2.weight")]  # sorted, layer by layer
        optimizer.load_state_dict((optimizer.impl.init(order),))
        mu = optimizer.state_dict()[0][0].mu
        optimizer.step(net(data(8)).square().mean())
        assert all(m.requires_grad is requires and m.is_leaf for m in mu)
        if requires:
            grads = torch.autograd.grad(net(data(8)).square().mean(), mu)
            assert all(g.abs().max() > 0 for g in grads)
        torchopt.recover_state_dict(net, state)


def test_data_parallel_around_the_model() -> None:
    expected = plain_loop(net_of(), sgd, data(8), 3)
    net = nn.DataParallel(net_of())
    optimizer = torchopt.MetaSGD(net, 0.1, momentum=0.9, weight_decay=0.02, dampening=0.3)
    torch.testing.assert_close(our_loop(net, optimizer, data(8), 3), expected, rtol=1e-9, atol=1e-12)


def test_float16_gradients_are_not_scaled_before_they_are_there() -> None:
    net = nn.Linear(1, 1, bias=False).half()
    with torch.no_grad():
        net.weight.fill_(1.0)
    weight, scale = net.weight, torch.tensor(6e-6, dtype=torch.float16)
    torchopt.MetaSGD(net, 0.01).step((net(torch.ones(1, 1, dtype=torch.float16)) * scale).sum() * 1000)
    assert torch.equal(net.weight, weight - 0.01 * (scale * 1000))


def test_errors_say_what_to_do() -> None:
    net = net_of()
    optimizer = torchopt.MetaSGD(net, 0.1)
    with pytest.raises(TypeError, match="impl: expected a GradientTransformation"):
        torchopt.MetaOptimizer(net, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module: expected an nn.Module"):
        torchopt.MetaSGD(net.parameters(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr: expected a number of at least 0"):
        torchopt.MetaAdam(net, -1.0)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        torchopt.MetaAdam(net, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="nesterov"):
        torchopt.MetaSGD(net, 0.1, nesterov=True)
    with pytest.raises(TypeError, match="loss: expected a scalar tensor"):
        optimizer.step(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="take its mean"):
        optimizer.step(net(data(8)))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch.no_grad"):
        optimizer.step(net(data(8)).mean())
    stale = net(data(8)).square().mean()
    optimizer.step(net(data(8)).square().mean())
    with pytest.raises(RuntimeError, match="depends on a parameter"):
        optimizer.step(stale)
    with pytest.raises(ValueError, match="state_dict: expected"):
        optimizer.load_state_dict(())
