"""The general path's own copy of the model: everything that it holds, other threads, what a forward leaves behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same, gradients, mlp, oracle, regression
from test_general import Batch, both_modes, norm_net, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtml import MAML
from mtml_kernels.general.choice import probe


class TwoNames(nn.Module):
    """One submodule under two names, and in a list, a dict, a method and a function that nobody registered."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.base, self.head = how, nn.Linear(3, 4), nn.Linear(4, 2)
        self.features = nn.Sequential(self.base, nn.Flatten())
        self.all = nn.ModuleList([self.base, self.head])
        self.named = nn.ModuleDict({"again": self.features})
        self.held = {"list": [self.base, (self.head,)]}
        self.method, self.function = self.base.forward, lambda x: self.base(x)
        self.bound, self.numbers = partial(F.linear, weight=self.base.weight), [self.base.bias]
        object.__setattr__(self, "me", self)

    def forward(self, x: Tensor) -> Tensor:
        calls: dict[str, Any] = {
            "two names": self.features,
            "module list": self.all[0],
            "module dict": self.named["again"],
            "plain list": self.held["list"][0],
            "bound method": self.method,
            "function": self.function,
            "tensors": lambda x: self.bound(x) + self.numbers[0],
            "itself": lambda x: self.me.base(x),
        }
        return self.head(torch.tanh(calls[self.how](x) + self.base(x)))


HOLDERS = ["two names", "module list", "module dict", "plain list", "bound method", "function", "tensors", "itself"]


@both_modes
@pytest.mark.parametrize("how", HOLDERS)
def test_modules_that_are_held_several_times(how: str, mode: str) -> None:
    """Each is one module for the forward, and none is changed by it."""
    model, batch = TwoNames(how).double(), regression()
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    want = oracle(TwoNamesPlain(model), batch, F.mse_loss, 0.1, 2).loss
    expected = gradients(want, list(model.parameters()))
    for _ in range(2):
        found = run(model, batch, mode).loss
        assert_same(found, want)
        assert_same(gradients(found, list(model.parameters())), expected)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
    assert all(isinstance(p, nn.Parameter) for part in model.modules() for p in part._parameters.values())


class TwoNamesPlain(nn.Module):
    """What `TwoNames` computes, every tensor under one name."""

    def __init__(self, model: TwoNames) -> None:
        super().__init__()
        self.base, self.head = model.base, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(2 * self.base(x)))


def test_two_names_train_as_a_plain_loop_does() -> None:
    for dtype in (torch.float32, torch.float64):
        model = TwoNames("two names").to(dtype)
        twin = TwoNamesPlain(copy.deepcopy(model))
        maml = MAML(model, 0.1, steps=2, loss="mse", backend="general")
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
        for _ in range(20):
            batch = tuple(t.to(dtype) for t in regression())
            losses = maml.meta_loss(*batch).mean(), oracle(twin, batch, F.mse_loss, 0.1, 2).loss.to(dtype).mean()
            for optimizer, loss in zip(optimizers, losses, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {}
        for got, want in ((model.base, twin.base), (model.head, twin.head)):
            assert_same(list(got.parameters()), list(want.parameters()), **close)


class Remembers(nn.Module):
    """A forward that leaves something for the loss: a penalty that adds up until the loss takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.penalty, self.calls = nn.Linear(3, 2), 0.0, 0
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.penalty, self.calls = self.penalty + self.layer.weight.square().sum(), self.calls + 1
        self.last = self.last.detach() + 1
        return self.layer(x)


def test_what_a_forward_leaves_on_the_model_is_there() -> None:
    model, batch = Remembers().double(), regression()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = (output - target).square().mean() + model.penalty
        model.penalty = 0.0
        return value

    found = run(model, batch, "loop", loss=loss, steps=2).loss
    assert model.calls == 9 and model.last.tolist() == [9.0, 9.0]

    def plain(output: Tensor, target: Tensor) -> Tensor:
        return (output[0] - target).square().mean() + output[1].square().sum()

    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return self.layer(x), self.layer.weight

    twin = Returns()
    twin.layer = model.layer
    want = run(twin, batch, "loop", loss=plain, steps=2).loss
    assert_same(found, want)
    assert_same(gradients(found, list(twin.parameters())), gradients(want, list(twin.parameters())))


@pytest.mark.parametrize("batch_norm", ["module", "batch", "running", "track"])
def test_the_model_may_run_in_other_threads_meanwhile(batch_norm: str) -> None:
    """Plain forwards of the model and other runs of the path see nothing of each other."""
    model, batch = norm_net(), regression()
    model(batch[0][0])
    model.eval()
    x, ready, wrong = batch[0][0], threading.Barrier(4), []

    def adapts() -> Tensor:
        return run(model, batch, "loop", batch_norm=batch_norm).loss

    def compare(call: Callable[[], Tensor], right: Tensor) -> None:
        ready.wait()
        try:
            for _ in range(15):
                assert_same(call(), right)
        except BaseException as error:
            wrong.append(error)

    calls = [(lambda: model(x), model(x)), (lambda: probed(model, batch), torch.zeros(()).double())]
    threads = [threading.Thread(target=compare, args=pair) for pair in [*calls, *[(adapts, adapts())] * 2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def probed(model: nn.Module, batch: Batch) -> Tensor:
    """1 where the look at the model takes another thread's forward for one that checkpoints its activations."""
    return torch.tensor(float(probe(model, batch[0], "module").recomputes), dtype=torch.float64)


def test_another_threads_checkpointing_is_not_the_models() -> None:
    """A model that runs its layers while another thread checkpoints: the look was a hook on every module there is."""
    model, batch, stop = mlp(3, 4, 2), regression(), threading.Event()
    other = nn.Linear(3, 3)

    def checkpoints() -> None:
        while not stop.is_set():
            checkpoint(other, torch.ones(1, 3, requires_grad=True), use_reentrant=False)

    thread = threading.Thread(target=checkpoints)
    thread.start()
    try:
        assert not any(float(probed(model, batch)) for _ in range(100))
    finally:
        stop.set()
        thread.join()


def test_compiled_modules_run_as_they_were() -> None:
    """torch.compile keeps the original's forward, and with it the original's tensors."""
    model, batch = mlp(3, 4, 2), regression()
    want = run(model, batch, "loop").loss
    compiled = torch.compile(model, backend="eager")
    assert_same(run(compiled, batch, "loop").loss, want)
    model.compile(backend="eager")
    assert_same(run(model, batch, "loop").loss, want)


def test_torch_script_modules_get_the_tensors_too() -> None:
    model, batch = mlp(3, 4, 2), regression()
    want = run(model, batch, "loop").loss
    scripted = nn.Sequential(model[0], torch.jit.script(nn.Sequential(model[1], model[2])))
    before = scripted(batch[0])
    found = run(scripted, batch, "loop").loss
    assert_same(found, want)
    assert_same(gradients(found, list(scripted.parameters())), gradients(want, list(model.parameters())))
    assert_same(scripted(batch[0]), before)
