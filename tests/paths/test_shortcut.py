"""Calls like one before run at once: with the bits of the long way, its errors, and by it wherever they differ."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtml
from mtml.algorithms import base
from mtml.paths import shortcut as _shortcut
from mtml.paths.batch import Batch
from mtml.paths.cache import Watch
from mtml.paths.shortcut import Shortcut
from mtml_kernels.native import engine
from mtml_kernels.native.tensors import call_tensors
from mtml_kernels.ops.inner_loop import BACKENDS


class Batches:
    """Counts the calls that go the long way."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, *parts: Any) -> Batch:
        self.made += 1
        return Batch(*parts)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Batches:
    found = Batches()
    monkeypatch.setattr(base, "Batch", found)
    return found


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def learner(**options: Any) -> mtml.MAML:
    return mtml.MAML(options.pop("model", None) or network(), **{"lr": 0.1, "steps": 2, "loss": "mse"} | options)


def batch(support: int = 4, query: int = 5, classes: bool = False) -> list[Tensor]:
    sx, qx = (torch.randn(3, n, 3).double() for n in (support, query))
    if classes:
        return [sx, torch.randint(2, (3, support)), qx, torch.randint(2, (3, query))]
    return [sx, torch.randn(3, support, 2).double(), qx, torch.randn(3, query, 2).double()]


def found(maml: mtml.MAML, data: Any, **options: Any) -> list[Tensor]:
    """Results and gradients."""
    result = maml.meta_forward(*data, **options)
    params = [p for p in maml.parameters() if p.requires_grad]
    unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # where tasks have starts of their own
    grads = torch.autograd.grad(result.loss.sum(), params, **unused) if result.loss.requires_grad else ()
    return [result.loss.detach(), result.output.detach(), result.support_losses.detach(), *grads]


def without(maml: mtml.MAML, data: Any, **options: Any) -> list[Tensor]:
    """The same the long way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "at_once", lambda *arguments: None)
        return found(maml, data, **options)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- what runs at once ------------------------------------------------------------------------------------------------


MODELS: dict[str, Callable[[], tuple[mtml.MAML, list[Tensor]]]] = {
    "mse": lambda: (learner(), batch()),
    "class ids": lambda: (learner(loss="cross_entropy"), batch(classes=True)),
    "first order": lambda: (learner(first_order=True), batch()),
    "learned rates": lambda: (learned(), batch()),
    "clamped rates": lambda: (learned(min=0.05, max=0.2), batch()),
    "some adapted": lambda: (learner(params="2.*"), batch()),
    "float32": lambda: (learner(model=network().float()), [t.float() for t in batch()]),
    "by name": lambda: (learner(backend="cpu"), batch()),
    "shaped": lambda: (
        learner(model=nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double(), loss="l1"),
        [*batch()[:1], torch.randn(3, 4, 2, 2).double(), *batch()[2:3], torch.randn(3, 5, 2, 2).double()],
    ),
}


def learned(**options: Any) -> mtml.MAML:
    net = network()
    return learner(model=net, lr=mtml.InnerLR(net, 0.1, per="tensor", **options))


@pytest.mark.parametrize("name", MODELS)
def test_the_second_call_and_all_behind_it_run_at_once(name: str, long: Batches) -> None:
    maml, data = MODELS[name]()
    first = found(maml, data)
    assert long.made == 1
    for _ in range(3):
        assert same(found(maml, data), first)
        loss = maml.meta_loss(*data)
        assert torch.equal(loss, first[0]) and loss.requires_grad
    assert long.made == 1
    assert same(without(maml, data), first)
    other = [t + 1 if t.is_floating_point() else 1 - t for t in data]
    assert same(found(maml, other), without(maml, other)) and not torch.equal(found(maml, other)[0], first[0])


def test_values_of_the_model_are_read_at_every_call(long: Batches) -> None:
    maml, data = learner(), batch()
    found(maml, data)
    with torch.no_grad():
        for p in maml.module.parameters():
            p.mul_(1.5)
    assert same(found(maml, data), without(maml, data))
    assert long.made == 2  # one of them in `without`


def test_sizes_steps_and_orders_have_their_own(long: Batches) -> None:
    maml = learner()
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        (batch(), {}), (batch(6, 7), {}), (batch(), {"steps": 3}), (batch(), {"first_order": True}),
        (batch(), {"steps": 0}), (batch(1, 1), {}),
    ]  # fmt: skip
    expected = [without(maml, data, **options) for data, options in calls]
    made = long.made
    for _ in range(2):
        assert all(same(found(maml, d, **o), e) for (d, o), e in zip(calls, expected, strict=True))
    assert long.made == made
    with torch.no_grad():
        values = [found(maml, d, **o) for d, o in calls]
        assert all(same(v, e[:3]) for v, e in zip(values, expected, strict=True))


# --- what goes the long way -------------------------------------------------------------------------------------------


OTHERS: dict[str, Callable[[list[Tensor]], tuple[Any, dict[str, Any]]]] = {
    "a mask": lambda d: (d, {"support_mask": torch.rand(3, 4).double()}),
    "step weights": lambda d: (d, {"step_weights": [0.5, 0.5]}),
    "query losses of all steps": lambda d: (d, {"query_steps": True}),
    "starts": lambda d: (d, {"start": {"0.weight": torch.randn(3, 8, 3).double()}}),
    "not contiguous": lambda d: ([torch.stack([t, t], -1)[..., 0] for t in d], {}),
    "negated": lambda d: ([torch._neg_view(-t) for t in d], {}),
    "in a tuple": lambda d: ([(d[0],), d[1], (d[2],), d[3]], {}),
    "data that require grad": lambda d: ([d[0].clone().requires_grad_(), *d[1:]], {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_like_it_has_results_of_its_own(name: str) -> None:
    maml, data = learner(), batch()
    found(maml, data)
    other, options = OTHERS[name](data)
    for _ in range(2):
        assert same(found(maml, other, **options), without(maml, other, **options))
        assert same(found(maml, data), without(maml, data))


BAD: dict[str, tuple[Callable[[list[Any]], Any], dict[str, Any]]] = {
    "another dtype": (lambda d: [d[0].float(), *d[1:]], {}),
    "other samples": (lambda d: [d[0][:, :2], *d[1:]], {}),
    "other tasks": (lambda d: [*d[:2], d[2][:2], d[3]], {}),
    "no tensor": (lambda d: [*d[:3], 1.0], {}),
    "a list": (lambda d: [*d[:3], [d[3]]], {}),
    "no query set": (lambda d: d[:2], {}),
    "steps below 0": (lambda d: d, {"steps": -1}),
    "a list of steps": (lambda d: d, {"steps": [2]}),
    "half a step": (lambda d: d, {"steps": 1.5}),
    "order by a word": (lambda d: d, {"first_order": "yes"}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_the_long_way(name: str) -> None:
    maml, data = learner(), batch()
    change, options = BAD[name]
    with pytest.raises((TypeError, ValueError)) as expected:
        without(learner(), change(data), **options)
    for _ in range(2):
        found(maml, data)
        with pytest.raises(type(expected.value)) as caught:
            found(maml, change(data), **options)
        assert str(caught.value) == str(expected.value)


def test_a_label_out_of_range_is_named_as_it_is_here(long: Batches) -> None:
    maml, data = learner(loss="cross_entropy"), batch(classes=True)
    wrong = [*data[:3], data[3].clone()]
    wrong[3][1, 2] = 5
    for _ in range(2):
        found(maml, data)
        with pytest.raises(ValueError, match=r"^qy: expected class ids.*got 5 at task 1, sample 2"):
            maml.meta_loss(*wrong)
    assert long.made == 1


def test_a_rate_that_is_not_finite_is_noticed() -> None:
    maml, data = learned(), batch()
    for _ in range(2):
        found(maml, data)
    with torch.no_grad():
        maml.lr.rates[0].fill_(float("nan"))
    with pytest.raises(ValueError, match="lr: expected finite"):
        found(maml, data)


@pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")
def test_transforms_and_modes_around_go_the_long_way() -> None:
    maml, data = learner(), batch()
    expected = found(maml, data)
    found(maml, data)
    named = dict(maml.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Loss(maml), {f"maml.{n}": v for n, v in values.items()}, tuple(data))

    grads = torch.func.grad(loss)(named)
    torch.testing.assert_close([*grads.values()], expected[3:])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(maml, data)[0], expected[0])
    with torch.inference_mode():
        assert torch.equal(maml.meta_loss(*data), expected[0])


class Loss(nn.Module):
    def __init__(self, maml: mtml.MAML) -> None:
        super().__init__()
        self.maml = maml

    def forward(self, *data: Tensor) -> Tensor:
        return self.maml.meta_loss(*data).sum()


def test_another_backend_in_the_same_place_is_asked(long: Batches) -> None:
    maml, data = learner(backend="cpu"), batch()
    expected = found(maml, data)
    before = BACKENDS.named("cpu")
    try:
        BACKENDS.register(type(before)("cpu", before.available, before.forward, before.backward, before.supports))
        assert same(found(maml, data), expected) and long.made == 2
    finally:
        BACKENDS.register(before)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_looks_after_itself(copied: Callable[[mtml.MAML], mtml.MAML]) -> None:
    maml, data = learner(), batch()
    for _ in range(2):
        found(maml, data)
    other = copied(maml)
    other.steps = 3
    assert same(found(other, data), without(other, data)) and not same(found(other, data), found(maml, data))


def test_a_class_that_overrides_the_call_is_asked() -> None:
    class Twice(mtml.MAML):
        def meta_forward(self, *data: Any, **options: Any) -> Any:
            result = super().meta_forward(*data, **options)
            return result._replace(loss=2 * result.loss)

    net, data = network(), batch()
    once, twice = (kind(net, 0.1, steps=2, loss="mse") for kind in (mtml.MAML, Twice))
    for _ in range(3):
        assert torch.equal(2 * once.meta_loss(*data), twice.meta_loss(*data))


def test_memory_of_forms_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shortcut, "FORMS", 3)
    maml = learner()
    for size in range(1, 9):
        found(maml, batch(size, size))
    (shortcut,) = maml._paths.shortcuts.values()
    assert isinstance(shortcut, Shortcut) and len(shortcut.lanes) <= 3


# --- the watch --------------------------------------------------------------------------------------------------------


def watch_of(maml: mtml.MAML) -> Watch:
    found(maml, batch())
    watch = maml._paths.now.watch
    assert isinstance(watch, Watch) and watch.native is not None
    return watch


def freeze(net: nn.Sequential) -> None:
    net[0].weight.requires_grad_(False)


def narrow(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data.float()


def cut(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data[:4]


def renamed(net: nn.Sequential) -> None:
    net._modules["first"] = net._modules.pop("0")


def reordered(net: nn.Sequential) -> None:
    net._modules["0"] = net._modules.pop("0")


def another_class(net: nn.Sequential) -> None:
    net[1].__class__ = nn.ReLU


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "values": lambda net: net[0].weight.data.mul_(2),
    "eval": lambda net: net.eval(),
    "frozen": freeze,
    "another dtype": narrow,
    "another shape": cut,
    "a parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach().clone())),
    "a module": lambda net: net.__setitem__(1, nn.ReLU()),
    "one more": lambda net: net.append(nn.Identity()),
    "one less": lambda net: net.__delitem__(1),
    "a name": renamed,
    "an order": reordered,
    "a class": another_class,
    "a hook": lambda net: net[1].register_forward_hook(lambda *a: None),
    "an attribute": lambda net: setattr(net[0], "extra", 1),
    "an attribute less": lambda net: net[0].__dict__.pop("training"),
    "a setting": lambda net: setattr(net[0], "in_features", 7),
    "a buffer": lambda net: net.register_buffer("b", torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_native_watch_sees_what_pythons_sees(name: str) -> None:
    net = network()
    watch = watch_of(learner(model=net))
    assert watch() and watch.looks_the_same()
    CHANGES[name](net)
    expected = name in ("nothing", "values")
    assert watch.looks_the_same() is expected
    assert watch.native is not None and watch.native() is expected


@pytest.fixture
def collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


def test_a_watched_model_is_freed(collected: None) -> None:
    """What watches it is held by the learner, and holds the model: a circle that the collector must see."""
    maml, data = learner(), batch()
    for _ in range(2):
        found(maml, data)
    gone = weakref.ref(maml.module)
    del maml
    gc.collect()
    assert gone() is None


def test_what_the_native_watch_cannot_compare_python_does() -> None:
    """A tensor of another class than PyTorch's own."""

    class Other(nn.Parameter):
        pass

    net = network()
    net[0].weight = Other(net[0].weight.detach())
    maml = learner(model=net)
    maml.meta_loss(*batch())
    watch = maml._paths.now.watch
    assert isinstance(watch, Watch) and watch.native is None and watch()
    net.eval()
    assert not watch()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"keys": []}, "pairs: expected as many"),
        ({"sizes": [1, 2]}, "sizes: expected one for each"),
        ({"tables": [["a list"]]}, "tables: expected dicts"),
        ({"tensors": [1.0]}, "tensors: expected plain ones"),
    ],
)
def test_a_snapshot_refuses_what_it_cannot_compare(changed: dict[str, Any], words: str) -> None:
    names = {"a": 1}
    parts: dict[str, Any] = {"owners": [names], "keys": ["a"], "values": [names["a"]], "tables": [names]}
    parts |= {"sized": [names], "sizes": [1], "tensors": [torch.ones(2)], "typed": [names]}
    plain = engine().Snapshot(reader=call_tensors(), **parts)
    assert plain()
    with pytest.raises(ValueError, match=words):
        engine().Snapshot(reader=call_tensors(), **parts | changed)
    names["b"] = 2
    assert not plain()
