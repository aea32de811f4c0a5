"""mtml.compat.higher: patched modules and inner loops, against plain autograd."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mtml.compat.higher as higher


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tied(nn.Module):
    """A layer that is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.first(x).tanh()).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.last = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x[:, None])[0][:, -1])


class Listed(nn.Module):
    """Holds its weights in a plain list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 2))
        self.chain = [self.w, self.v]

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.chain[0]).tanh() @ self.chain[1]


class Unlisted(Listed):
    """The same for functional_call, which does not look into lists."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).tanh() @ self.v


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


MODELS: dict[str, Any] = {
    "mlp": mlp,
    "batch norm": normed,
    "tied": Tied,
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "weights in a list": Listed,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
}


def data(steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(steps + 1)]


def plain(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float, second: bool = True, copied: bool = True
) -> list[Tensor]:
    """Loss and meta-gradients of gradient descent, by functional_call; buffers are those of a copy."""
    model = copy.deepcopy(model) if copied else model  # functional_call leaves its tensors in a layer of two names
    if isinstance(model, Listed):
        model.__class__ = Unlisted
    own = dict(model.named_parameters())
    theta: dict[str, Tensor] = dict(own)
    for x, y in batches[:-1]:
        loss = F.mse_loss(functional_call(model, theta, (x,)), y)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=second)
        theta = {name: p - lr * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    x, y = batches[-1]
    loss = F.mse_loss(functional_call(model, theta, (x,)), y)
    return [loss, *torch.autograd.grad(loss, list(own.values()))]


def by_higher(model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float) -> list[Tensor]:
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for x, y in batches[:-1]:
            diffopt.step(F.mse_loss(fmodel(x), y))
        loss = F.mse_loss(fmodel(batches[-1][0]), batches[-1][1])
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).abs().max() / (b.abs().max() + 1e-12)).item() for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_an_inner_loop_is_that_of_plain_autograd_to_second_order(name: str) -> None:
    model, batches = MODELS[name](), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = by_higher(model, batches, 0.3)
    assert far(found, plain(model, batches, 0.3)) < 1e-9
    assert far(found[1:], plain(model, batches, 0.3, second=False)[1:]) > 1e-3, "first order would do as well"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model changed"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_run_so_that_older_weight_norm_is_adapted() -> None:
    model, batches = nn.utils.weight_norm(nn.Linear(4, 2)), data()
    assert far(by_higher(model, batches, 0.3), plain(model, batches, 0.3, copied=False)) < 1e-9


@pytest.mark.slow  # torch.compile takes a while to import
def test_a_compiled_module_is_patched_as_it_was_before() -> None:
    model, batches = mlp(), data()
    assert far(by_higher(torch.compile(model), batches, 0.3), plain(model, batches, 0.3)) < 1e-9


def test_buffers_are_of_the_context_and_go_on_from_step_to_step() -> None:
    model, batches = normed(), data()
    by_hand = copy.deepcopy(model)
    fmodel = higher.monkeypatch(model)
    for x, _ in batches:
        fmodel(x)
        by_hand(x)
    assert torch.equal(fmodel[1].running_mean, by_hand[1].running_mean) and not model[1].running_mean.any()
    higher.patch.buffer_sync(model, fmodel)
    assert not fmodel[1].running_mean.any()
    with pytest.raises(KeyError, match="'3'"):
        higher.patch.buffer_sync(model, higher.monkeypatch(mlp()))


def test_weights_by_time() -> None:
    model, batches = mlp(), data(2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for x, y in batches[:2]:
            new = diffopt.step(F.mse_loss(fmodel(x), y))
        assert all(a is b for a, b in zip(new, fmodel.parameters(), strict=True))
        assert all(a is b for a, b in zip(fmodel.init_fast_params, fmodel.parameters(time=0), strict=True))
        assert [next(fmodel.parameters(time=t)) is new[0] for t in range(3)] == [False, False, True]
        assert all(torch.equal(a, b) for a, b in zip(fmodel.init_fast_params, model.parameters(), strict=True))
        with pytest.raises(IndexError, match="below 3, got 3"):
            fmodel.parameters(time=3)
        with pytest.warns(UserWarning, match="recurse"):
            fmodel.parameters(recurse=False)


def test_without_tracking_nothing_is_kept_and_nothing_reaches_the_model() -> None:
    model, (x, y) = mlp(), data()[0]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    context = higher.innerloop_ctx(model, opt, copy_initial_weights=False, track_higher_grads=False)
    with context as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(F.mse_loss(fmodel(x), y))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        fmodel(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="track_higher_grads"):
        _ = fmodel.init_fast_params
    with pytest.raises(ValueError, match="only the last"):
        fmodel.parameters(time=1)
    with pytest.raises(ValueError, match="track_higher_grads"):
        fmodel.track_higher_grads = 1


def test_assigning_to_a_parameter_is_a_step() -> None:
    model, x = mlp(), data()[0][0]
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    fmodel[2].weight = fmodel[2].weight * 0
    assert torch.equal(fmodel(x), model[2].bias.expand(6, 2)) and len(fmodel._fast.history) == 2
    assert torch.equal(list(fmodel.parameters(time=0))[2], model[2].weight)
    with pytest.raises(TypeError, match="weight: expected a tensor"):
        fmodel[2].weight = 1.0
    fmodel[2].note = "other attributes are free"
    fmodel.extra = nn.Linear(1, 1)


def test_parts_are_called_directly_and_take_all_weights() -> None:
    model, x = mlp(), data()[0][0]
    fmodel = higher.monkeypatch(model)
    assert torch.equal(fmodel[0](x), model[0](x))
    twice = [2 * p for p in fmodel.parameters()]
    assert torch.equal(fmodel[0](x, params=twice), F.linear(x, 2 * model[0].weight, 2 * model[0].bias))
    assert torch.equal(fmodel(x), fmodel(x, params=twice)) and torch.equal(fmodel.forward(x, params=twice), fmodel(x))


def test_a_functional_module_has_no_weights_of_its_own() -> None:
    model, x = mlp(), data()[0][0]
    fmodel = higher.patch.make_functional(model)
    assert fmodel.fast_params is None
    for call in (lambda: fmodel(x), lambda: fmodel.forward(x), lambda: fmodel[0](x)):
        with pytest.raises(ValueError, match="params"):
            call()
    for ask in (lambda: fmodel.parameters(), lambda: setattr(fmodel[0], "weight", torch.zeros(6, 4))):
        with pytest.raises(RuntimeError, match="params"):
            ask()
    assert torch.equal(fmodel(x, params=list(model.parameters())), model(x))
    given: list[Any] = []
    higher.patch.make_functional(model, encapsulator=lambda *both: given.extend(both))
    assert given[1] is model


def test_classes_names_and_hooks_are_the_models() -> None:
    model, x = Tied(), data()[0][0]
    seen = []
    model.last.register_forward_hook(lambda part, args, out: seen.append(part))
    fmodel = higher.monkeypatch(model)
    fmodel(x)
    assert isinstance(fmodel, Tied) and isinstance(fmodel, higher.patch._MonkeyPatchBase)
    assert seen == [fmodel.last] and fmodel.first is fmodel.again
    assert type(fmodel).__name__ == "FunctionalTied" and type(fmodel.last).__name__ == "InnerFunctionalLinear"
    assert [name for name, _ in fmodel.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert type(fmodel) is type(higher.monkeypatch(model)), "a class a call is what made the original slow"


def test_a_patched_module_is_freed_without_the_garbage_collector() -> None:
    model, (x, y) = Recurrent(nn.LSTM), data()[0]
    gc.collect()
    gc.disable()
    try:
        with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters())) as (fmodel, diffopt):
            weight = weakref.ref(diffopt.step(F.mse_loss(fmodel(x), y))[0])
        del fmodel, diffopt
        assert weight() is None
    finally:
        gc.enable()


def test_pickle_and_deepcopy() -> None:
    model, (x, y) = Recurrent(nn.GRU), data()[0]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
    for again in (pickle.loads(pickle.dumps(fmodel)), copy.deepcopy(fmodel)):
        assert torch.equal(again(x), fmodel(x)) and type(again) is type(fmodel)
        again.update_params([0 * p for p in again.parameters()])
        assert not again(x).any() and fmodel(x).any(), "the copy has weights of its own"
    copied = copy.deepcopy(model)  # the model itself is what it was
    assert copied.state_dict().keys() == pickle.loads(pickle.dumps(model)).state_dict().keys()


def test_state_dicts_go_from_a_patched_module_to_the_model() -> None:
    model, (x, y) = normed(), data()[0]
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), 0.1)) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        model.load_state_dict(fmodel.state_dict())
        model.eval(), fmodel.eval()
        assert torch.equal(model(x), fmodel(x))


def test_frozen_parameters_stay_and_stay_frozen() -> None:
    model, (x, y) = mlp(), data()[0]
    model[0].requires_grad_(False)
    for track in (True, False):
        opt = torch.optim.SGD(model.parameters(), 0.1)
        with higher.innerloop_ctx(model, opt, track_higher_grads=track) as (fmodel, diffopt):
            diffopt.step(F.mse_loss(fmodel(x), y))
            assert torch.equal(fmodel[0].weight, model[0].weight) and not fmodel[0].weight.requires_grad
            assert not torch.equal(fmodel[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        (lambda: "net", TypeError, "nn.Module"),
        (lambda: higher.monkeypatch(mlp()), ValueError, "not patched yet"),
        (lambda: nn.Sequential(higher.monkeypatch(mlp())), ValueError, "not patched yet"),
        (lambda: torch.jit.trace(mlp(), torch.zeros(1, 4)), TypeError, "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_patched(module: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        higher.monkeypatch(module())


def test_models_in_wrappers(tmp_path: Path) -> None:
    model, (x, _) = mlp(), data()[0]
    assert torch.equal(higher.monkeypatch(nn.DataParallel(model))(x), model(x))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="DistributedDataParallel"):
            higher.monkeypatch(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_of_another_number_or_kind() -> None:
    fmodel = higher.monkeypatch(mlp())
    with pytest.raises(ValueError, match="expected 4 tensors, one a parameter, got 1"):
        fmodel.update_params([torch.zeros(1)])
    with pytest.raises(TypeError, match=r"expected tensors, got 0\.0"):
        fmodel.fast_params = [0.0] * 4


def _meta_step(model: nn.Module, copies: bool, outer: torch.optim.Optimizer, **options: Any) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    outer.zero_grad()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=copies, **options) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        F.mse_loss(fmodel(x), y).backward()
    outer.step()


def test_meta_gradients_that_go_nowhere_are_said_once() -> None:
    model = mlp()
    outer = torch.optim.Adam(model.parameters())
    with pytest.warns(UserWarning, match="copy_initial_weights=False") as said:
        for _ in range(2):
            _meta_step(model, True, outer)
    assert len(said) == 1 and said[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_where_gradients_arrive_or_are_not_wanted_nothing_is_said() -> None:
    model, rate = mlp(), torch.tensor(0.1, requires_grad=True)
    _meta_step(model, False, torch.optim.Adam(model.parameters()))
    model = mlp()  # a rate is learned: gradients in copies of the weights are a by-product
    _meta_step(model, True, torch.optim.Adam([rate]), override={"lr": [rate]})
    assert rate.grad is not None
    model(torch.randn(6, 4)).sum().backward()  # and the model is trained by itself
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.optim.SGD(mlp().parameters(), 0.1).step()  # another model, without gradients
    model = mlp()  # gradients are copied by hand
    fmodel = higher.monkeypatch(model)
    fmodel(torch.randn(6, 4)).sum().backward()
    for p, fast in zip(model.parameters(), fmodel.parameters(), strict=True):
        p.grad = fast.grad
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_a_loss_of_the_model_in_the_place_of_its_patched_copy_is_said() -> None:
    model, (x, y) = mlp(), data()[0]
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), 0.1)) as (fmodel, diffopt):
        with pytest.warns(UserWarning, match="none of the patched model's latest weights"):
            diffopt.step(F.mse_loss(model(x), y))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            diffopt.step(F.mse_loss(fmodel(x), y))
