"""mtml.compat.higher's optimisers: torch.optim's values, gradients by finite differences, settings to learn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import mtml.compat.higher as higher


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


RULES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "sgd maximize": (optim.SGD, {"lr": 0.01, "maximize": True}),
    "adam": (optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adam amsgrad": (optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "adam decoupled": (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw amsgrad": (optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "adadelta": (optim.Adadelta, {"lr": 0.5, "eps": 1e-3, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "adamax": (optim.Adamax, {"lr": 0.1, "weight_decay": 0.1}),
    "asgd": (optim.ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 1, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.02, "weight_decay": 0.1}),
    "rmsprop centered": (optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    "rprop": (optim.Rprop, {"lr": 0.05}),
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def warm(model: nn.Module, opt: optim.Optimizer, x: Tensor) -> None:
    opt.zero_grad()
    model(x).square().mean().backward()
    opt.step()


@pytest.mark.parametrize("warmed", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_torch(rule: str, warmed: int) -> None:
    kind, settings = RULES[rule]
    model, xs = net(), torch.randn(5, 6, 3)
    half = list(model.parameters())[:2], list(model.parameters())[2:]
    opt = kind([{"params": half[0], "lr": 0.07}, {"params": half[1]}], **settings)
    for _ in range(warmed):
        warm(model, opt, xs[0])
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        for x in xs:
            diffopt.step(fmodel(x).square().mean())
    found = [p.detach() for p in fmodel.parameters()]
    for x in xs:  # the model and its optimiser are still where they were
        warm(model, opt, x)
    for a, b in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("warmed", [0, 1])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "rprop"])
def test_gradients_to_the_start_and_to_every_number(rule: str, warmed: int) -> None:
    kind, settings = RULES[rule]
    model, x = nn.Linear(2, 1), torch.randn(3, 5, 2)
    opt = kind(model.parameters(), **settings)
    for _ in range(warmed):
        warm(model, opt, x[0])
    trainable = {k: v for k, v in higher.optim.get_trainable_opt_params(opt).items() if k not in ("t0", "lr_decay")}
    trainable = {k: v for k, v in trainable.items() if k != "initial_accumulator_value" and any_given(v)}
    leaves = higher.utils.flatten(trainable)

    def after(weight: Tensor, bias: Tensor, *numbers: Tensor) -> Tensor:
        left = iter(numbers)
        override = higher.utils.recursive_map(trainable, lambda _: next(left))
        diffopt = higher.get_diff_optim(opt, model.parameters(), override=override)
        params = [weight, bias]
        for each in x:
            params = diffopt.step((each @ params[0].T + params[1]).square().mean(), params=params)
        return torch.cat([p.flatten() for p in params])

    start = [p.detach().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(after, (*start, *leaves), atol=1e-6)


def any_given(values: list[Any]) -> bool:
    """Settings of 0 switch a part of the rule off, which a tensor in their place would switch on."""
    return all(float(v.detach()) != 0 for v in higher.utils.flatten(values))


def test_rprop_has_no_second_order_part_and_a_rate() -> None:
    model, x = nn.Linear(2, 1), torch.randn(5, 2)
    rate = torch.tensor(0.1, requires_grad=True)
    opt = optim.Rprop(model.parameters())
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().mean())
        new = list(fmodel.parameters())
    grads = torch.autograd.grad(sum(p.sum() for p in new), [*model.parameters(), rate])  # type: ignore[arg-type]
    assert torch.equal(grads[0], torch.ones(1, 2)) and torch.equal(grads[1], torch.ones(1)) and grads[2] != 0


def test_a_gradient_of_zero_leaves_no_nan() -> None:
    for rule in ("adam", "adam amsgrad", "adagrad", "rmsprop", "rmsprop centered", "adamax", "adadelta"):
        kind, settings = RULES[rule]
        w = torch.ones(2, requires_grad=True)
        opt = higher.create_diff_optim(kind, {**settings, "weight_decay": 0.0}, params=[w])
        params = [w]
        for _ in range(2):
            params = opt.step((params[0] * torch.tensor([1.0, 0.0])).square().sum(), params=params)
        (grad,) = torch.autograd.grad(params[0].sum(), w)
        assert grad.isfinite().all() and grad[1] == 1, rule


@pytest.mark.parametrize("lr", [[torch.tensor(0.3)], torch.tensor(0.3), torch.tensor([0.3]), 0.3])
def test_an_override_is_a_list_a_tensor_or_a_number(lr: Any) -> None:
    model, x = net(), torch.randn(6, 3)
    with higher.innerloop_ctx(model, optim.SGD(model.parameters(), 0.3)) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().mean())
        wanted = list(fmodel.parameters())
    for when in ("at first", "at the step"):
        start = {"lr": lr} if when == "at first" else None
        with higher.innerloop_ctx(model, optim.SGD(model.parameters(), 9.0), override=start) as (fmodel, diffopt):
            diffopt.step(fmodel(x).square().mean(), override=None if start else {"lr": lr})
            for a, b in zip(fmodel.parameters(), wanted, strict=True):
                torch.testing.assert_close(a, b)


def test_a_rate_for_each_group() -> None:
    model, x = net(), torch.randn(6, 3)
    params = list(model.parameters())
    opt = optim.SGD([{"params": params[2:]}, {"params": params[:2]}], lr=0.3)
    rates = torch.tensor([0.0, 1.0], requires_grad=True)
    with higher.innerloop_ctx(model, opt, override={"lr": rates}) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().mean())
        changed = [not torch.equal(a, b) for a, b in zip(params, fmodel.parameters(), strict=True)]
        assert changed == [True, True, False, False]
        fmodel(x).square().mean().backward()
    assert rates.grad is not None and (rates.grad != 0).all()


def test_callbacks_see_all_gradients_in_order() -> None:
    model, x = net(), torch.randn(6, 3)
    model[0].bias.requires_grad_(False)
    opt = optim.SGD([list(model.parameters())[3], list(model.parameters())[2]], lr=1.0)
    seen: list[Any] = []

    def halved(grads: Any) -> list[Any]:
        seen.append([None if g is None else tuple(g.shape) for g in grads])
        return [None if g is None else g / 2 for g in grads]

    fmodel = higher.monkeypatch(model)
    diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, grad_callback=halved)
    loss = fmodel(x).square().mean()
    (grad,) = torch.autograd.grad(loss, fmodel[2].bias, retain_graph=True)
    diffopt.step(loss)
    assert seen == [[(4, 3), None, (2, 4), (2,)]]
    torch.testing.assert_close(fmodel[2].bias, model[2].bias - grad / 2)
    with pytest.raises(ValueError, match="grad_callback: expected 4 gradients"):
        diffopt.step(fmodel(x).square().mean(), grad_callback=lambda grads: grads[:1])


def test_parameters_without_a_gradient_stay_decay_and_all() -> None:
    model = nn.ParameterDict({"used": nn.Parameter(torch.ones(2)), "zero": nn.Parameter(torch.ones(2))})
    for kind in (optim.SGD, optim.AdamW):
        opt = higher.get_diff_optim(kind(model.parameters(), lr=0.1, weight_decay=0.5), model.parameters())
        used, unused = opt.step(model["used"].square().sum(), params=model.parameters())
        assert used is not model["used"] and unused is model["zero"]


def test_new_optimisers_of_shapes_groups_and_patched_models() -> None:
    model, x = net(), torch.randn(6, 3)
    fmodel = higher.monkeypatch(model)
    weights = list(fmodel.parameters())
    groups = [{"params": weights[2:], "lr": 0.5}, {"params": weights[:2]}]
    by_groups = higher.create_diff_optim(optim.SGD, {"lr": 0.1}, params=groups, fmodel=fmodel)
    grads = torch.autograd.grad(fmodel(x).square().mean(), weights)
    new = by_groups.step(fmodel(x).square().mean())
    for p, g, rate, found in zip(weights, grads, (0.1, 0.1, 0.5, 0.5), new, strict=True):
        torch.testing.assert_close(found, p - rate * g)
    fmodel = higher.monkeypatch(model)
    higher.create_diff_optim(optim.Adam, {"lr": 0.1}, fmodel=fmodel).step(fmodel(x).square().mean())
    with pytest.raises(ValueError, match="params"):
        higher.create_diff_optim(optim.Adam, {"lr": 0.1})


def test_settings_to_learn_and_back() -> None:
    opt = optim.Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.5}], lr=0.1)
    trainable = higher.optim.get_trainable_opt_params(opt)
    assert set(trainable) == {"lr", "betas", "eps", "weight_decay"}, "switches are no numbers to learn"
    assert [float(v.detach()) for v in trainable["lr"]] == [0.1, 0.5]
    trainable["lr"][1].data.fill_(0.25)
    trainable["betas"][0][1].data.fill_(0.75)
    higher.optim.apply_trainable_opt_params(opt, trainable)
    first, second = opt.param_groups
    assert first["betas"] == (0.9, 0.75) and second["lr"] == 0.25 and isinstance(second["lr"], float)
    with pytest.raises(ValueError, match=r"override\['lr'\]: expected one value, or one for each of 2"):
        higher.optim.apply_trainable_opt_params(opt, {"lr": [0.1] * 3})
    with pytest.raises(ValueError, match="'rate'"):
        higher.optim.apply_trainable_opt_params(opt, {"rate": [0.1]})
    with pytest.raises(ValueError, match="built like"):
        higher.optim.apply_trainable_opt_params(opt, {"betas": [torch.tensor(0.1)]})


def test_a_registered_optimiser() -> None:
    class Signs(optim.SGD):
        pass

    class DifferentiableSigns(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    group["params"][i] = p - group["lr"] * g.sign()

    model, x = net(), torch.randn(6, 3)
    opt = Signs(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match="got 'Signs'; register_optim"):
        higher.get_diff_optim(opt, model.parameters())
    higher.register_optim(Signs, DifferentiableSigns)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().mean())
    assert torch.equal((fmodel[2].bias - model[2].bias).abs(), torch.full((2,), 0.5))


def test_state_is_copied_at_creation() -> None:
    model, x = net(), torch.randn(6, 3)
    opt = optim.Adam(model.parameters(), lr=0.1)
    warm(model, opt, x)
    before = copy.deepcopy(opt.state_dict())
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        assert torch.equal(diffopt.state[0][0]["exp_avg"], opt.state[model[0].weight]["exp_avg"])
        diffopt.step(fmodel(x).square().mean())
        assert diffopt.state[0][0]["step"] == 2
    after = opt.state_dict()
    assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())


def test_errors_name_what_was_expected() -> None:
    model, x = net(), torch.randn(6, 3)
    opt = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="reference_params"):
        higher.get_diff_optim(opt, net().parameters())
    with pytest.raises(ValueError, match=r"expected settings among lr, .*, got 'rate'"):
        higher.get_diff_optim(opt, model.parameters(), override={"rate": [0.1]})
    with pytest.raises(ValueError, match="for each of 1 groups of parameters, got 2"):
        higher.get_diff_optim(opt, model.parameters(), override={"lr": [0.1, 0.2]})
    diffopt = higher.get_diff_optim(opt, model.parameters())
    with pytest.raises(ValueError, match="params: expected"):
        diffopt.step(model(x).sum())
    diffopt = higher.get_diff_optim(opt, model.parameters(), higher.monkeypatch(model))
    with pytest.raises(TypeError, match=r"scalar tensor, got 1\.0"):
        diffopt.step(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one number, got \[6, 2\]"):
        diffopt.step(model(x))
    with pytest.raises(RuntimeError, match="does not require grad"):
        diffopt.step(model(x).sum().detach())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    fmodel = higher.monkeypatch(table)
    diffopt = higher.get_diff_optim(optim.SGD(table.parameters(), 0.1), table.parameters(), fmodel)
    with pytest.raises(RuntimeError, match="sparse=False"):
        diffopt.step(fmodel(torch.tensor([1])).sum())
