"""mtml.compat.higher.meta_loss: the same as the loop over tasks, for every optimiser, in one call."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import mtml
import mtml.compat.higher as higher


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(tasks: int = 3) -> tuple[Tensor, ...]:
    return torch.randn(tasks, 5, 3), torch.randn(tasks, 5, 2), torch.randn(tasks, 4, 3), torch.randn(tasks, 4, 2)


def by_loop(model: nn.Module, opt: optim.Optimizer, data: Any, steps: int, override: Any = None) -> Tensor:
    losses = []
    for sx, sy, qx, qy in zip(*data, strict=True):
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override=override) as (fmodel, diffopt):
            for _ in range(steps):
                diffopt.step(F.mse_loss(fmodel(sx), sy))
            losses.append(F.mse_loss(fmodel(qx), qy))
    return torch.stack(losses)


def compare(model: nn.Module, opt: optim.Optimizer, override: Any = None, leaves: Any = ()) -> list[Tensor]:
    """Losses and gradients of both ways are the same; those of the one line."""
    data, wanted = batch(), [p for p in model.parameters() if p.requires_grad]
    pair = []
    for way in ("loop", "line"):
        if way == "loop":
            losses = by_loop(model, opt, data, 3, override)
        else:
            losses = higher.meta_loss(model, opt, *data, steps=3, loss="mse", override=override)
        weights = torch.arange(1.0, 4.0)
        grads = torch.autograd.grad((losses * weights).sum(), [*wanted, *leaves], materialize_grads=True)
        pair.append([losses.detach(), *grads])
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    return pair[1]


FUSED: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adam": (optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "adam decoupled": (optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "rmsprop": (optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
}
GENERAL: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "maximize": (optim.SGD, {"lr": 0.01, "maximize": True}),
    "amsgrad": (optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "adadelta": (optim.Adadelta, {"lr": 0.5}),
    "adagrad": (optim.Adagrad, {"lr": 0.1}),
    "adamax": (optim.Adamax, {"lr": 0.1}),
    "asgd": (optim.ASGD, {"lr": 0.1}),
    "rprop": (optim.Rprop, {"lr": 0.05}),
}


@pytest.mark.filterwarnings("error::mtml.FallbackWarning")
@pytest.mark.parametrize("rule", FUSED)
def test_the_engines_rules_run_fused_as_the_loop_does(rule: str) -> None:
    kind, settings = FUSED[rule]
    model = net()
    compare(model, kind(model.parameters(), **settings))


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
@pytest.mark.parametrize("rule", GENERAL)
def test_other_rules_run_on_the_general_path(rule: str) -> None:
    kind, settings = GENERAL[rule]
    model = net()
    compare(model, kind(model.parameters(), **settings))


def test_a_fallback_is_said() -> None:
    model = net()
    with pytest.warns(mtml.FallbackWarning):
        higher.meta_loss(model, optim.Adagrad(model.parameters()), *batch(), loss="mse")


@pytest.mark.filterwarnings("error::mtml.FallbackWarning")
def test_groups_of_rates_and_rates_to_learn() -> None:
    model = net()
    params = list(model.parameters())
    opt = optim.Adam([{"params": params[2:], "lr": 0.2}, {"params": params[:2]}], lr=0.1)
    compare(model, opt)
    rates = [torch.tensor(0.2, requires_grad=True), torch.tensor(0.1, requires_grad=True)]
    betas = torch.tensor(0.8, requires_grad=True), torch.tensor(0.95, requires_grad=True)
    found = compare(model, opt, {"lr": rates, "betas": [betas]}, [*rates, *betas])
    assert all(g != 0 for g in found[-4:])
    one = nn.Parameter(torch.tensor(0.3))
    compare(model, optim.SGD(params), {"lr": one}, [one])


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
def test_settings_that_differ_by_group_and_tensors_of_them() -> None:
    model = net()
    params = list(model.parameters())
    opt = optim.SGD([{"params": params[2:], "momentum": 0.9}, {"params": params[:2]}], lr=0.1)
    compare(model, opt)
    rho = torch.tensor(0.8, requires_grad=True)
    found = compare(model, optim.Adadelta(params, lr=0.5), {"rho": [rho]}, [rho])
    assert found[-1] != 0


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
def test_state_is_taken_over() -> None:
    model = net()
    opt = optim.Adam(model.parameters(), lr=0.1)
    compare(model, opt)
    model(torch.randn(4, 3)).square().mean().backward()
    opt.step()
    compare(model, opt)
    opt.state.clear()
    compare(model, opt)


def test_some_parameters_and_frozen_ones() -> None:
    model = net()
    model[2].bias.requires_grad_(False)
    compare(model, optim.SGD(model.parameters(), lr=0.1))
    compare(model, optim.SGD(model[2].parameters(), lr=0.1))  # ANIL


def test_batch_normalisation_by_its_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    for _ in range(3):
        model(torch.randn(9, 3))
    before = {name: b.clone() for name, b in model.named_buffers()}
    for training in (True, False):
        model.train(training)
        compare(model, optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_changes_between_two_calls_are_followed_without_another_trace() -> None:
    model, data = net(), batch()
    opt = optim.SGD(model.parameters(), lr=0.1)
    higher.meta_loss(model, opt, *data, steps=2, loss="mse")
    learner = higher.batched._learners[opt]
    for settings in ({"lr": 0.2}, {"momentum": 0.9}, {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.1}):
        opt.param_groups[0].update(settings)
        torch.testing.assert_close(
            higher.meta_loss(model, opt, *data, steps=2, loss="mse"), by_loop(model, opt, data, 2), rtol=1e-9, atol=0.0
        )
    second = higher.meta_loss(model, opt, mtml.TaskBatch(*data), steps=2, loss="l1")
    assert not torch.equal(second, higher.meta_loss(model, opt, *data, steps=2, loss="mse"))
    assert higher.batched._learners[opt] is learner
    other = net()
    opt.param_groups[0]["params"] = list(other.parameters())
    higher.meta_loss(other, opt, *data, steps=2, loss="mse")


def test_first_order_and_no_grad() -> None:
    model, data = net(), batch()
    opt = optim.SGD(model.parameters(), lr=0.5)
    exact, first = (
        torch.autograd.grad(
            higher.meta_loss(model, opt, *data, steps=3, loss="mse", first_order=order).sum(), [*model.parameters()]
        )
        for order in (False, True)
    )
    assert max((a - b).abs().max() for a, b in zip(exact, first, strict=True)) > 1e-3
    with torch.no_grad():
        assert not higher.meta_loss(model, opt, *data, loss="mse").requires_grad


def test_what_is_kept_goes_with_the_optimiser() -> None:
    model = net()
    opt = optim.SGD(model.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher.meta_loss(model, opt, *batch(), loss="mse")
        adagrad = optim.Adagrad(model.parameters())
        higher.meta_loss(model, adagrad, *batch(), loss="mse")
    gone = weakref.ref(opt), weakref.ref(adagrad), weakref.ref(model)
    del opt, adagrad, model
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
def test_another_form_of_an_optimiser_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signs(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                pairs = zip(group["params"], grads, strict=True)
                group["params"] = [p - group["lr"] * g.tanh() for p, g in pairs]

    monkeypatch.setattr(higher.optim, "_known", {**higher.optim._known, optim.SGD: Signs})
    model = net()
    compare(model, optim.SGD(model.parameters(), lr=0.1))


def test_errors() -> None:
    model = net()
    with pytest.raises(TypeError, match="opt: expected an optimiser"):
        higher.meta_loss(model, 0.1, *batch())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="some of another model"):
        higher.meta_loss(model, optim.SGD(net().parameters(), 0.1), *batch())
    with pytest.raises(ValueError, match="expected one of Adadelta"):
        higher.meta_loss(model, optim.NAdam(model.parameters()), *batch())
    with pytest.raises(ValueError, match="got 'rate'"):
        higher.meta_loss(model, optim.SGD(model.parameters(), 0.1), *batch(), override={"rate": [0.1]})
