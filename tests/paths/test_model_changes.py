"""Whatever changes between two calls is followed: the next call gives what plain autograd gives on the model as it is.

Every case is fused before the change (or says that it is not), and the change is one that shows in the numbers.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.changing_layers import setting_cases, structure_cases
from cases.changing_models import Case, attribute_cases, name_cases, restore, scaled
from cases.maml_oracle import assert_same, gradients, oracle
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import mtml
from mtml import MAML
from mtml.paths import cache as _cache
from mtml.paths import finder as _plan
from mtml.paths.contents import LIMIT, Contents
from mtml.paths.finder import FIRST_LOOK
from mtml_kernels.ops.inner_loop import BACKENDS

CASES = dict([*attribute_cases(), *name_cases(), *setting_cases(), *structure_cases()])


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mtml.FallbackWarning)
        yield
    restore()


def batch_for(case: Case) -> tuple[Tensor, ...]:
    shape = (2, 6, 6) if case.image else (3,)
    sizes = ((2, 5, *shape), (2, 5, 2), (2, 4, *shape), (2, 4, 2))
    return tuple(torch.randn(size, dtype=torch.float64) for size in sizes)


def results(maml: MAML, batch: Any) -> list[Any]:
    loss = maml.meta_loss(*batch)
    return [loss, *gradients(loss, [p for p in maml.module.parameters() if p.requires_grad])]


def expected(model: nn.Module, batch: Any) -> list[Any]:
    loss = oracle(model, batch, F.mse_loss, 0.1, 2).loss
    return [loss, *gradients(loss, [p for p in model.parameters() if p.requires_grad])]


def follow(case: Case) -> None:
    maml, batch = MAML(case.model, 0.1, steps=2, loss="mse"), batch_for(case)
    before = results(maml, batch)
    assert_same(before, expected(case.model, batch))
    case.change()
    after = expected(case.model, batch)
    assert not torch.allclose(before[0], after[0], rtol=1e-6), "the change must show"
    assert_same(results(maml, batch), after)
    assert_same(results(maml, batch), after)  # from the cache


@pytest.mark.parametrize("name", CASES)
def test_a_change_of_the_model_is_followed(name: str) -> None:
    follow(CASES[name]())


@pytest.mark.parametrize("kind", ["function", "layer"])
def test_a_change_of_pytorch_itself_is_followed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "function":
        model = scaled(lambda self: 1.0, act=lambda x: F.relu(x))
        type(model).forward = lambda self, x: self.last(self.act(self.first(x)))  # type: ignore[method-assign]
        follow(Case(model, lambda: monkeypatch.setattr(F, "relu", torch.sigmoid)))
    else:
        twice = lambda self, x: 2.0 * torch.tanh(x)  # noqa: E731
        follow(Case(_linear(), lambda: monkeypatch.setattr(nn.Tanh, "forward", twice)))


def test_a_global_hook_is_followed() -> None:
    handles: list[Any] = []
    double = lambda module, args, out: 2.0 * out if isinstance(module, nn.Tanh) else None  # noqa: E731
    try:
        follow(Case(_linear(), lambda: handles.append(register_module_forward_hook(double))))
    finally:
        for handle in handles:
            handle.remove()


def test_the_changes_are_many_and_are_made_to_fused_programs() -> None:
    cases = dict([*attribute_cases(), *name_cases()])
    fused = 0
    for make in cases.values():
        case = make()
        fused += MAML(case.model, 0.1, loss="mse").explain(*batch_for(case)).path == "fused"
    assert len(CASES) >= 120 and fused == len(cases)


def test_what_no_name_shows_is_found_by_tracing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTML_TEST_GAIN", "1.0")
    case = Case(scaled(lambda self: float(os.environ["MTML_TEST_GAIN"])), lambda: None)
    maml, batch = MAML(case.model, 0.1, steps=2, loss="mse"), batch_for(case)
    before = maml.meta_loss(*batch)
    monkeypatch.setenv("MTML_TEST_GAIN", "2.0")
    for _ in range(FIRST_LOOK):
        after = maml.meta_loss(*batch)
    assert not torch.allclose(before, after)
    assert_same(after, expected(case.model, batch)[0])
    assert maml._paths.now is not None and maml._paths.now.left > FIRST_LOOK


def test_plain_layers_are_never_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's runs in them."""
    case = CASES["submodule"]()
    maml, batch = MAML(case.model, 0.1, loss="mse"), batch_for(case)
    maml.meta_loss(*batch)
    monkeypatch.setattr(_plan, "trace", lambda *_, **__: pytest.fail("traced again"))
    for _ in range(2 * FIRST_LOOK):
        maml.meta_loss(*batch)


class Counted(nn.Module):
    """An attribute that forward reads is set at every step, to what it was; another that it does not read changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.steps, self.log = nn.Linear(3, 2), 1.0, 0, [0.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.layer(x)


def test_what_forward_does_not_read_costs_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counted().double()
    case = Case(model, lambda: None)
    maml, batch = MAML(model, 0.1, loss="mse"), batch_for(case)
    maml.meta_loss(*batch)
    monkeypatch.setattr(_plan, "trace", lambda *_, **__: pytest.fail("traced again"))
    for step in range(5):
        model.steps, model.gain, model.log = step, float("1.0"), [*model.log, float(step)]
        model.note = "new"  # type: ignore[assignment]
        maml.meta_loss(*batch)


def test_a_model_that_changes_at_every_step_is_followed_at_every_step() -> None:
    model = Counted().double()
    case = Case(model, lambda: None)
    maml, batch = MAML(model, 0.1, steps=2, loss="mse"), batch_for(case)
    for gain in (1.0, 0.5, 0.25, 1.0, 0.0):
        model.gain = gain
        assert_same(results(maml, batch), expected(model, batch))


def test_a_model_that_becomes_fusable_is_fused() -> None:
    model = scaled(lambda self: 1.0, act=torch.atan)
    type(model).forward = lambda self, x: self.last(self.act(self.first(x)))  # type: ignore[method-assign]
    maml = MAML(model, 0.1, loss="mse", backend=BACKENDS.available()[0])
    batch = batch_for(Case(model, lambda: None))
    with pytest.raises(mtml.BackendUnavailable, match="atan"):
        maml.meta_loss(*batch)
    model.act = torch.tanh
    assert_same(maml.meta_loss(*batch), oracle(model, batch, F.mse_loss, 0.1, 1).loss)


def test_a_model_that_begins_to_read_what_no_name_shows_is_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTML_TEST_GAIN", "1.0")
    model = scaled(lambda self: self.gain, gain=1.0)
    maml, batch = MAML(model, 0.1, steps=2, loss="mse"), batch_for(Case(model, lambda: None))
    maml.meta_loss(*batch)
    type(model).number = lambda self: float(os.environ["MTML_TEST_GAIN"])
    maml.meta_loss(*batch)
    monkeypatch.setenv("MTML_TEST_GAIN", "2.0")
    for _ in range(FIRST_LOOK):
        after = maml.meta_loss(*batch)
    assert_same(after, expected(model, batch)[0])


def test_a_long_list_is_not_copied_at_every_call() -> None:
    """A replay buffer that forward looks at: beyond a size the model is traced again now and then instead."""
    model = scaled(lambda self: float(len(self.held) > 0), held=[0.0] * (2 * LIMIT))
    contents = Contents()
    contents.visit(model.held)
    assert not contents.complete and len(contents.tokens) < 10
    maml, batch = MAML(model, 0.1, steps=2, loss="mse"), batch_for(Case(model, lambda: None))
    assert_same(results(maml, batch), expected(model, batch))
    assert maml._paths.now is not None and maml._paths.now.left > 0


# --- the options of a MAML --------------------------------------------------------------------------------------------


class Threshold:
    """A predicate with a setting."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, name: str, tensor: Tensor) -> bool:
        return tensor.ndim >= self.least


def classes(model: nn.Module) -> tuple[Tensor, ...]:
    sx, qx = (torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(2))
    return sx, torch.randint(2, (2, 5)), qx, torch.randint(2, (2, 5))


def _linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[MAML], Any]]] = {
    # how it is made, and what changes
    "number": ({"lr": 0.1}, lambda m: setattr(m, "lr", 0.3)),
    "number in a dict": ({"lr": dict.fromkeys(NAMES, 0.1)}, lambda m: m.lr.update({"0.weight": 0.5})),
    "all numbers in a dict": ({"lr": dict.fromkeys(NAMES, 0.1)}, lambda m: m.lr.update(dict.fromkeys(NAMES, 0.5))),
    "tensor for a number": ({"lr": dict.fromkeys(NAMES, 0.1)}, lambda m: m.lr.update({"0.weight": torch.tensor(0.5)})),
    "number for a tensor": (
        {"lr": dict.fromkeys(NAMES, 0.1) | {"0.weight": torch.tensor(0.1)}},
        lambda m: m.lr.update({"0.weight": 0.5}),
    ),
    "tensor in place": ({"lr": torch.tensor(0.1, dtype=torch.float64)}, lambda m: m.lr.fill_(0.5)),
    "tensor replaced": ({"lr": torch.tensor(0.1)}, lambda m: setattr(m, "lr", torch.tensor(0.5))),
    "rates of each step": ({"lr": torch.tensor([0.1, 0.1])}, lambda m: m.lr.mul_(5.0)),
    "steps": ({}, lambda m: setattr(m, "steps", 1)),
    "order": ({}, lambda m: setattr(m, "first_order", True)),
    "loss": ({}, lambda m: setattr(m, "loss", lambda o, t: 2.0 * F.cross_entropy(o, t))),
    "loss by name": ({"loss": "cross_entropy"}, lambda m: setattr(m, "loss", nn.CrossEntropyLoss(label_smoothing=0.5))),
    "loss's ignored id": ({"loss": nn.CrossEntropyLoss()}, lambda m: setattr(m.loss, "ignore_index", 1)),
    "loss's class weights": (
        {"loss": nn.CrossEntropyLoss()},
        lambda m: setattr(m.loss, "weight", torch.tensor([1.0, 5.0], dtype=torch.float64)),
    ),
    "loss's class weights in place": (
        {"loss": nn.CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float64))},
        lambda m: m.loss.weight.mul_(torch.tensor([1.0, 5.0])),
    ),
    "loss's smoothing": ({"loss": nn.CrossEntropyLoss()}, lambda m: setattr(m.loss, "label_smoothing", 0.5)),
    "loss's reduction": ({"loss": nn.CrossEntropyLoss()}, lambda m: setattr(m.loss, "reduction", "sum")),
    "loss's forward": (
        {"loss": nn.CrossEntropyLoss()},
        lambda m: setattr(m.loss, "forward", lambda o, t: 2.0 * F.cross_entropy(o, t)),
    ),
    "loss's hook": (
        {"loss": nn.CrossEntropyLoss()},
        lambda m: m.loss.register_forward_hook(lambda n, a, out: 2.0 * out),
    ),
    "partial's keywords": (
        {"loss": functools.partial(F.cross_entropy, label_smoothing=0.1)},
        lambda m: m.loss.keywords.update(label_smoothing=0.5),
    ),
    "query loss": ({}, lambda m: setattr(m, "query_loss", nn.CrossEntropyLoss(label_smoothing=0.5))),
    "query loss's reduction": (
        {"query_loss": nn.CrossEntropyLoss()},
        lambda m: setattr(m.query_loss, "reduction", "sum"),
    ),
    "list of parameters": ({"params": ["0.*"]}, lambda m: m.params.append("2.*")),
    "pattern": ({"params": "0.*"}, lambda m: setattr(m, "params", "2.*")),
    "predicate's setting": ({"params": Threshold(1)}, lambda m: setattr(m.params, "least", 2)),
    "update rule": (
        {},
        lambda m: setattr(m, "update", lambda p, g, r, k: {n: p[n] - 2.0 * r[n] * g[n] for n in p}),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_change_of_the_options_is_followed(name: str) -> None:
    options, change = copy.deepcopy(OPTIONS[name][0]), OPTIONS[name][1]
    model = _linear()
    batch = classes(model)
    lr = options.pop("lr", 0.1)
    maml = MAML(model, lr, **({"steps": 2, "loss": "cross_entropy"} | options))
    before = results(maml, batch)
    change(maml)
    kept = {n: getattr(maml, n) for n in ("first_order", "steps", "loss", "query_loss", "params", "update")}
    after = results(MAML(model, maml.lr, **kept, backend="general"), batch)
    assert not all(a.allclose(b, rtol=1e-6) for a, b in zip(before, after, strict=True)), "the change must show"
    assert_same(results(maml, batch), after)
    assert_same(results(maml, batch), after)


@pytest.mark.parametrize("option", ["loss", "query_loss", "update"])
def test_what_a_live_callable_holds_costs_no_preparation(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that logs, a rule that counts: they run as they are at every call, so nothing was read in advance."""
    log: list[float] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        log.append(1.0)
        return F.cross_entropy(output, target)

    def update(params: dict[str, Tensor], grads: Any, rates: Any, step: int) -> dict[str, Tensor]:
        log.append(1.0)
        return {name: value - rates[name] * grads[name] for name, value in params.items()}

    model = _linear()
    maml = MAML(model, 0.1, steps=2, **{option: update if option == "update" else loss})
    batch = classes(model)
    first = maml.meta_loss(*batch)
    monkeypatch.setattr(_cache, "PathFinder", lambda *_: pytest.fail("prepared again"))
    for _ in range(3):
        length = len(log)
        assert_same(maml.meta_loss(*batch), first)
        assert len(log) > length


@pytest.mark.parametrize("kind", [nn.HuberLoss, nn.SmoothL1Loss])
@pytest.mark.parametrize("value", [3, 0.25])
def test_a_loss_keeps_step_with_its_threshold(kind: type[nn.Module], value: float) -> None:
    """Whole numbers were not seen: 1 -> 3 was not, 1.0 -> 3.0 was."""
    loss, model = kind(), _linear()
    maml, batch = MAML(model, 0.1, steps=2, loss=loss), batch_for(Case(model, lambda: None))
    batch = (batch[0], 3.0 * batch[1], batch[2], 3.0 * batch[3])
    before = maml.meta_loss(*batch)
    setattr(loss, "delta" if kind is nn.HuberLoss else "beta", value)
    after = oracle(model, batch, loss, 0.1, 2).loss
    assert not torch.allclose(before, after, rtol=1e-6)
    assert_same(maml.meta_loss(*batch), after)
