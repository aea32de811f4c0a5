"""Transformations, functional and ordinary optimizers of mtml.compat.torchopt."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml.compat
from mtml.compat import torchopt

O = torch.optim  # noqa: E741
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (torchopt.SGD, O.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (torchopt.SGD, O.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (torchopt.Adam, O.Adam, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    "adamw": (torchopt.AdamW, O.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "adamax": (torchopt.AdaMax, O.Adamax, {"lr": 0.1, "weight_decay": 0.01}),
    "radam": (torchopt.RAdam, O.RAdam, {"lr": 0.1, "weight_decay": 0.01}),
    "adadelta": (torchopt.AdaDelta, O.Adadelta, {"lr": 0.5, "weight_decay": 0.01}),
    "adagrad": (torchopt.AdaGrad, O.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    "rmsprop": (torchopt.RMSProp, O.RMSprop, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}),
    "centered": (torchopt.RMSProp, O.RMSprop, {"lr": 0.1, "centered": True, "eps": 1e-2}),
}


def net_of() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    net.late = nn.Parameter(torch.ones(2, dtype=torch.float64))  # its first gradient is that of the third step
    return net


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    late: Any = net.late
    return (net(x) + (late if step > 1 else 0)).square().mean()


@pytest.mark.parametrize("name", PAIRS)
def test_optimizers_are_those_of_torch(name: str) -> None:
    ours, theirs, options = PAIRS[name]
    nets = net_of(), net_of()
    optimizers = ours(nets[0].parameters(), **options), theirs(nets[1].parameters(), **options)
    for step in range(8):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss_of(net, step).backward()
            before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
            assert all(map(torch.equal, before, [p.grad for p in net.parameters() if p.grad is not None]))
        if step == 1 and name in ("radam", "adamax"):  # whose t all parameters share here, as in the original
            torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-9, atol=1e-12)
            return
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-9, atol=1e-12)


def test_optimizer_takes_a_closure_and_zeroes() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torchopt.Optimizer([weight], torchopt.sgd(0.25))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0 and weight.item() == 0.5  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert weight.grad is not None and weight.grad.item() == 0.0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [torchopt.sgd, torchopt.adam, torchopt.rmsprop, torchopt.adagrad, torchopt.adadelta])
def test_update_of_a_tree(make: Callable[..., Any], inplace: bool) -> None:
    params = {"a": torch.ones(2), "b": [torch.ones(3), None], "c": {}}
    grads = {"a": torch.full((2,), 0.5), "b": [None, None], "c": {}}
    rule = torchopt.chain(torchopt.clip_grad_norm(10.0), make(0.1))
    state = rule.init(params)
    updates, state = rule.update(grads, state, params=params, inplace=inplace)
    assert (updates["a"] is grads["a"]) is inplace and updates["b"] == [None, None] and updates["c"] == {}
    new = torchopt.apply_updates(params, updates, inplace=inplace)
    assert (new["a"] is params["a"]) is inplace and new["b"][0] is params["b"][0]  # type: ignore[index]
    assert (new["a"] < 1.0).all()


def test_in_place_and_not_are_the_same_numbers() -> None:
    rule = torchopt.chain(torchopt.nan_to_num(0.0), torchopt.adamw(0.1, weight_decay=0.1))
    results = []
    for inplace in (False, True):
        params, state = [torch.ones(3)], None
        state = rule.init(params)
        for k in range(3):
            given = [torch.tensor([1.0, -2.0, torch.nan]) + k]
            updates, state = rule.update(given, state, params=params, inplace=inplace)
            params = torchopt.apply_updates(params, updates, inplace=inplace)
        results.append(params[0])
    assert torch.equal(*results) and results[0].isfinite().all()


def test_clipping_is_that_of_torch_and_names_what_is_not_finite() -> None:
    for kind in (2.0, 1.0, float("inf")):
        grads = [torch.tensor([3.0, 4.0]), None, torch.tensor([[12.0]])]
        found, _ = torchopt.clip_grad_norm(1.0, kind).update(grads, (), inplace=False)
        params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))]
        params[0].grad, params[1].grad = grads[0].clone(), grads[2].clone()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(params, 1.0, kind)
        torch.testing.assert_close([found[0], found[2]], [p.grad for p in params])
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
        torchopt.clip_grad_norm(1.0, error_if_nonfinite=True).update([torch.tensor(torch.inf)], ())


def test_masks_of_every_form() -> None:
    params, grads = (torch.ones(2), torch.ones(1)), (torch.zeros(2), torch.zeros(1))
    for mask in ([True, False], (True, False), lambda leaves: [p.numel() > 1 for p in leaves]):
        rule = torchopt.transform.add_decayed_weights(0.5, mask)
        updates, _ = rule.update(grads, rule.init(params), params=params, inplace=False)
        assert [u.tolist() for u in updates] == [[0.5, 0.5], [0.0]]
    with pytest.raises(ValueError, match="mask: expected one bool"):
        torchopt.transform.add_decayed_weights(0.5, [True, False, True]).init(params)
    with pytest.raises(ValueError, match="params: weight decay needs"):
        torchopt.sgd(0.1, weight_decay=0.1).update(grads, ((), ()))


def test_chains_are_flat_and_pickle() -> None:
    chain = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(0.1, weight_decay=0.1), torchopt.base.identity())
    assert len(chain.transformations) == 4  # type: ignore[attr-defined]
    assert chain == torchopt.base.identity().chain(chain) and chain != torchopt.adam(0.1)
    assert len({chain, torchopt.base.identity().chain(chain)}) == 1
    params, grads = [torch.ones(2)], [torch.ones(2)]
    expected = chain.update(grads, chain.init(params), params=params, inplace=False)[0]
    for again in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain)):
        assert again.update(grads, again.init(params), params=params, inplace=False)[0][0].equal(expected[0])
    with pytest.raises(TypeError, match="chain: expected GradientTransformations"):
        torchopt.chain(torchopt.sgd(0.1), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call init"):
        chain.update(grads, ())


def test_functions_of_the_users_own_stand_in_a_chain() -> None:
    def update(updates: Any, state: int, *, params: Any = None, inplace: bool = True) -> tuple[Any, int]:
        assert isinstance(updates, dict)  # the tree itself
        return {name: 2 * g for name, g in updates.items()}, state + 1

    own = torchopt.base.GradientTransformation(lambda params: 0, update)
    rule, params = torchopt.chain(own, torchopt.sgd(0.5)), {"x": torch.ones(1)}
    state = rule.init(params)
    for _ in range(2):
        updates, state = rule.update({"x": torch.ones(1)}, state, params=params)
    assert updates["x"].item() == -1.0 and state[0] == 2


def test_func_optimizer_takes_trees_and_is_differentiable() -> None:
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    params: Any = {"x": x, "spare": torch.ones(1, requires_grad=True)}
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(0.1))
    for _ in range(2):
        params = optimizer.step(params["x"].pow(3).sum(), params)
    grad = torch.autograd.grad(params["x"].sum(), x)[0]
    step = 1 - 0.3  # x - 0.1 * 3 x^2 at 1
    torch.testing.assert_close(grad, torch.tensor([(1 - 0.6) * (1 - 0.6 * step)], dtype=torch.float64))
    leaf = [torch.ones(1, requires_grad=True)]
    assert torchopt.FuncOptimizer(torchopt.adam(0.1), inplace=True).step(leaf[0].sum(), leaf)[0] is leaf[0]
    assert leaf[0].item() == pytest.approx(0.9) and leaf[0].is_leaf


def test_transformations_run_under_torch_func() -> None:
    rule = torchopt.adam(0.1, eps_root=1e-6)

    def after(x: Tensor) -> Tensor:
        state = rule.init((x,))
        for _ in range(2):
            grads = torch.func.grad(lambda y: y.pow(3).sum())(x)
            updates, state = rule.update((grads,), state, params=(x,), inplace=False)
            x = torchopt.apply_updates((x,), updates, inplace=False)[0]
        return x.sum()

    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    found = torch.func.vmap(torch.func.grad(after))(x)
    expected = torch.stack([torch.autograd.grad(after(row), row)[0] for row in x.unbind()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_schedules() -> None:
    schedule = torchopt.schedule
    linear = schedule.linear_schedule(1.0, 0.0, 10, 2)
    assert [linear(k) for k in (0, 2, 7, 12, 50)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert linear(torch.tensor(7)) == 0.5 and schedule.linear_schedule(1.0, 0.0, 0)(5) == 1.0
    down = schedule.exponential_decay(1.0, 0.5, transition_steps=2, end_value=0.2)
    assert [down(k) for k in (0, 2, 4, 9)] == [1.0, 0.5, 0.25, 0.2]
    assert schedule.exponential_decay(1.0, 2.0, end_value=3.0)(5) == 3.0
    assert schedule.exponential_decay(1.0, 0.0)(5) == 1.0


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import torchopt` finds ours, for one test."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    mtml.compat.install("torchopt", replace=True)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchopt"]:
        del sys.modules[name]


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("name", ["diff", "distributed", "linalg", "linear_solve", "nn", "visual"])
def test_what_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ImportError, match=f"torchopt.{name}: .* not (here|drawn)"):
        __import__(f"torchopt.{name}.anything")
    with pytest.raises(ImportError, match="or install torchopt"):
        exec(f"from torchopt import {name}")
    with pytest.raises(AttributeError, match="or install torchopt"):
        getattr(torchopt, name)
    assert all(getattr(torchopt, public) is not None for public in torchopt.__all__)


def test_accelerated_op_is_where_the_device_is() -> None:
    assert torchopt.accelerated_op_available("cpu") and torchopt.accelerated_op_available(["cpu", torch.device("cpu")])
    assert torchopt.accelerated_op_available() is torch.cuda.is_available()
