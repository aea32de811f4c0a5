"""torchopt.meta_loss: the loop over tasks by the batched engine, with the same results."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtml
from mtml.compat import torchopt

T, S = 3, 6


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch(seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(T, S, n, generator=generator, dtype=torch.float64) for n in (2, 1, 2, 1))


def loop(
    net: nn.Module, inner: Any, data: tuple[Tensor, ...], steps: int, loss: Any = F.mse_loss, inputs: Any = None
) -> list[Tensor]:
    """[losses, gradients of their weighted sum]: as a script has it, task by task."""
    inputs = list(net.parameters()) if inputs is None else inputs
    state = torchopt.extract_state_dict(net, detach_buffers=True)
    states = torchopt.extract_state_dict(inner)
    losses = []
    for sx, sy, qx, qy in zip(*data, strict=True):
        for _ in range(steps):
            inner.step(loss(net(sx), sy))
        losses.append(loss(net(qx), qy))
        torchopt.recover_state_dict(net, state)
        torchopt.recover_state_dict(inner, states)
    return graded(torch.stack(losses), inputs)


def graded(losses: Tensor, params: list[Any]) -> list[Tensor]:
    weights = torch.arange(1.0, T + 1, dtype=losses.dtype)
    return [losses, *torch.autograd.grad((weights * losses).sum(), params, materialize_grads=True)]


B = (0.9, 0.99)
linear = torchopt.schedule.linear_schedule(0.1, 0.02, transition_steps=3)
FUSED: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda net: torchopt.MetaSGD(net, 0.1),
    "momentum": lambda net: torchopt.MetaSGD(net, 0.1, 0.9, weight_decay=0.01, dampening=0.2),
    "nesterov": lambda net: torchopt.MetaSGD(net, 0.1, 0.9, nesterov=True),
    "schedule": lambda net: torchopt.MetaSGD(net, linear),
    "adam": lambda net: torchopt.MetaAdam(net, 0.1, B, 1e-3, 0.02, eps_root=1e-6),
    "adam, schedule": lambda net: torchopt.MetaAdam(net, linear, B),
    "adamw": lambda net: torchopt.MetaAdamW(net, 0.1, B, 1e-3, 0.1),
    "rmsprop": lambda net: torchopt.MetaRMSProp(net, 0.02, 0.9, momentum=0.5, weight_decay=0.01),
    "centered": lambda net: torchopt.MetaRMSProp(net, 0.02, 0.9, 1e-2, centered=True),
}
GENERAL: dict[str, Callable[[nn.Module], Any]] = {
    "ascent": lambda net: torchopt.MetaSGD(net, 0.01, maximize=True),
    "adamax": lambda net: torchopt.MetaAdaMax(net, 0.1, B, 1e-3),
    "radam": lambda net: torchopt.MetaRAdam(net, 0.1, B),
    "adadelta": lambda net: torchopt.MetaAdaDelta(net, 0.5, eps=1e-3),
    "adagrad": lambda net: torchopt.MetaAdaGrad(net, 0.1, 0.05, initial_accumulator_value=0.1),
    "decay of weights only": lambda net: torchopt.MetaAdamW(
        net, 0.1, weight_decay=0.3, mask=lambda p: [t.ndim > 1 for t in p]
    ),
    "clipped": lambda n: torchopt.MetaOptimizer(n, torchopt.chain(torchopt.clip_grad_norm(0.1), torchopt.sgd(0.1))),
    "own functions": lambda net: torchopt.MetaOptimizer(net, SIGNED),
}


def _halved(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
    return torchopt.pytree.tree_map(lambda g: -0.05 * g * g, updates), state


SIGNED = torchopt.base.GradientTransformation(lambda params: (), _halved)


@pytest.mark.parametrize("name", [*FUSED, *GENERAL])
def test_the_same_as_the_loop(name: str, recwarn: pytest.WarningsRecorder) -> None:
    net, data = net_of(), batch()
    inner = (FUSED | GENERAL)[name](net)
    expected = loop(net, inner, data, steps=3)
    found = graded(torchopt.meta_loss(net, inner, *data, steps=3, loss="mse"), list(net.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    fell_back = any(issubclass(w.category, mtml.FallbackWarning) for w in recwarn)
    assert fell_back == (name in GENERAL)


def test_first_order_differs_from_it() -> None:
    net, data = net_of(), batch()
    inner, params = torchopt.MetaSGD(net, 0.1), list(net.parameters())
    exact = graded(torchopt.meta_loss(net, inner, *data, steps=3, loss="mse"), params)
    first = graded(torchopt.meta_loss(net, inner, *data, steps=3, loss="mse", first_order=True), params)
    assert torch.equal(exact[0], first[0])
    assert max((a - b).abs().max() for a, b in zip(exact, first, strict=True)) > 1e-3


def test_batch_norm_as_with_detached_buffers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    sx, _, qx, _ = batch()
    ids = torch.arange(S).remainder(3).expand(T, S)
    before = copy.deepcopy(net.state_dict())
    inner = torchopt.MetaSGD(net, 0.1)
    expected = loop(net, inner, (sx, ids, qx, ids), 2, F.cross_entropy)
    found = graded(torchopt.meta_loss(net, inner, sx, ids, qx, ids, steps=2), list(net.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_an_optimizer_of_a_part_adapts_that_part() -> None:
    net, data = net_of(), batch()
    inner = torchopt.MetaSGD(net[2], 0.1)
    expected = loop(net, inner, data, steps=3)
    found = graded(torchopt.meta_loss(net, inner, *data, steps=3, loss="mse"), list(net.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_learnt_rate_gets_its_gradient() -> None:
    net, data, lr = net_of(), batch(), nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    for rate in (lr, lambda count: lr / (1 + count)):
        inner = torchopt.MetaSGD(net, rate)
        expected = loop(net, inner, data, 2, inputs=[lr])
        for _ in range(2):
            found = graded(torchopt.meta_loss(net, inner, *data, steps=2, loss="mse"), [lr])
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_engine_is_kept_and_follows_changes() -> None:
    net, data = net_of(), batch()
    inner = torchopt.MetaSGD(net, 0.1)
    torchopt.meta_loss(net, inner, *data, loss="mse")
    kept = inner._engine[1]
    torchopt.meta_loss(net, inner, mtml.TaskBatch(*data), steps=4, loss="mse")
    assert inner._engine[1] is kept
    inner.impl = torchopt.sgd(0.2)
    losses = loop(net, inner, data, 1)[0]
    torch.testing.assert_close(torchopt.meta_loss(net, inner, *data, loss="mse"), losses, rtol=1e-9, atol=0)
    assert torchopt.meta_loss(net, inner, *data, loss="l1").shape == (T,)
    again = pickle.loads(pickle.dumps((net, inner)))  # together, as a checkpoint of a script would have them
    torch.testing.assert_close(torchopt.meta_loss(*again, *data, loss="mse"), losses, rtol=1e-9, atol=0)
    again = copy.deepcopy((net, inner))
    torch.testing.assert_close(loop(*again, data, 1)[0], losses, rtol=1e-9, atol=0)


class Moments(NamedTuple):
    """As the original's states are: other classes with the same fields."""

    mu: list[Tensor]
    nu: list[Tensor]
    count: list[Tensor]


def test_errors_say_what_to_do() -> None:
    net, data = net_of(), batch()
    with pytest.raises(TypeError, match="inner: expected a MetaOptimizer"):
        torchopt.meta_loss(net, torch.optim.SGD(net.parameters(), 0.1), *data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps none of its parameters"):
        torchopt.meta_loss(net, torchopt.MetaSGD(net_of(), 0.1), *data, loss="mse")
    inner = torchopt.MetaAdam(net)
    inner.add_param_group(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="one module"):
        torchopt.meta_loss(net, inner, *data, loss="mse")
    inner = torchopt.MetaAdam(net)
    zeros = [torch.zeros_like(p) for p in net.parameters()]
    inner.load_state_dict([(Moments(zeros, zeros, [torch.tensor(1) for _ in zeros]), ())])
    with pytest.raises(ValueError, match="taken no step"):
        torchopt.meta_loss(net, inner, *data, loss="mse")
