"""Tracing leaves the live model, other threads and the caller's context alone, and is not coloured by them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.maml_oracle import assert_same
from cases.trace_contexts import CONTEXTS, checkpointed
from torch import Tensor, nn
from torch.func import functional_call

from mtml import MAML
from mtml_kernels.program import trace

warm = pytest.mark.filterwarnings("ignore::mtml.FallbackWarning")


class Twice(nn.Module):
    """`names` decides under which further names the block is registered; forward is the same for all."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)
        if names == "sequential":
            self.features = nn.Sequential(self.base, nn.Flatten())
        elif names == "nested":
            self.outer = nn.Sequential(nn.Sequential(nn.Sequential(self.base)))
        elif names == "list":
            self.parts = nn.ModuleList([self.base, self.head, self.base])
        elif names == "dict":
            self.parts = nn.ModuleDict({"a": self.base, "b": nn.ModuleDict({"c": self.head})})
        elif names == "layer":
            self.first = self.base[0]
        elif names == "plain list":
            self.parts = [self.base, [self.head]]
        elif names == "tied":
            self.twin = nn.Linear(3, 5)
            self.twin.weight = self.base[0].weight
        elif names == "parameter":
            self.own = self.base[0].weight
        elif names == "before":
            base = self.base
            del self.base
            self.features, self.base = nn.Sequential(base), base

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "twin"):
            return self.head(torch.tanh(self.twin(x)) + self.base(x))
        if hasattr(self, "features"):
            return self.head(self.features(x))
        return self.head(self.base(x))


KINDS = ["sequential", "nested", "list", "dict", "layer", "plain list", "tied", "parameter", "before"]


def batch(dtype: torch.dtype = torch.float64, tasks: int = 3) -> tuple[Tensor, ...]:
    return tuple(torch.randn(tasks, n, width, dtype=dtype) for n, width in ((5, 3), (5, 2), (4, 3), (4, 2)))


def plain_loss(model: nn.Module, data: tuple[Tensor, ...], steps: int = 2, lr: float = 0.1) -> Tensor:
    """Query losses [T] in plain PyTorch. functional_call gets a copy: it does not restore what has two names."""
    start, shell, losses = dict(model.named_parameters()), copy.deepcopy(model), []
    for sx, sy, qx, qy in zip(*data, strict=True):
        fast = start
        for _ in range(steps):
            loss = F.mse_loss(functional_call(shell, fast, sx), sy)
            grads = torch.autograd.grad(
                loss, [*fast.values()], create_graph=True, materialize_grads=True, allow_unused=True
            )
            fast = {n: p - lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.mse_loss(functional_call(shell, fast, qx), qy))
    return torch.stack(losses)


def parts(model: nn.Module) -> list[Any]:
    """Every place of a parameter with what stands there."""
    found = model.named_parameters(remove_duplicate=False)
    return [(name, id(p), type(p), p.dtype, p.requires_grad, p.is_leaf, p._version) for name, p in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("names", KINDS)
def test_shared_modules_stay_as_they_are_and_are_trained(names: str, dtype: torch.dtype) -> None:
    model = Twice(names).to(dtype)
    before, state = parts(model), copy.deepcopy(model.state_dict())
    data, optimizer = batch(dtype), torch.optim.SGD(model.parameters(), 0.1)
    maml = MAML(model, 0.1, steps=2, loss="mse")
    trace(model, [(3,)])
    assert maml.explain(*data).path == "fused"
    with torch.no_grad():
        maml.meta_loss(*data)
    assert parts(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(3):
        for losses, opt in ((maml.meta_loss(*data), optimizer), (plain_loss(twin, data), other)):
            opt.zero_grad()
            losses.sum().backward()
            opt.step()
    assert [row[:-1] for row in parts(model)] == [row[:-1] for row in before]
    for (name, found), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert not torch.equal(found, state[name]), name
        assert_same(found, want, **({} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}))


class OmniglotCNN(nn.Module):
    """In the manner of learn2learn's: `base` once more inside `features`. Four blocks there, two here."""

    def __init__(self, hidden: int = 4, ways: int = 3) -> None:
        super().__init__()
        self.base = nn.Sequential(*(self.block(1 if i == 0 else hidden, hidden) for i in range(2)))
        self.features = nn.Sequential(nn.Unflatten(1, (1, 8)), self.base, nn.Flatten())
        self.classifier = nn.Linear(4 * hidden, ways)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        norm = nn.BatchNorm2d(outputs, affine=True, track_running_stats=False)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """OmniglotCNN's forward with these parameters: nothing but functions."""
    x = x[:, None]
    for i in range(2):
        weight = [p[f"base.{i}.{name}"] for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
        x = F.conv2d(x, weight[0], weight[1], 2, 1)
        x = F.relu(F.batch_norm(x, None, None, weight[2], weight[3], training=True))
    return F.linear(x.flatten(1), p["classifier.weight"], p["classifier.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learn2learns_omniglot_network_trains_as_by_a_plain_loop(dtype: torch.dtype) -> None:
    model = OmniglotCNN().to(dtype)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    maml = MAML(model, 0.3, steps=2)
    optimizers = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(weights.values(), 0.1)
    first = [p.detach().clone() for p in model.parameters()]
    for _ in range(20):
        labels = torch.arange(3).repeat(2, 2)
        data = torch.randn(2, 6, 8, 8, dtype=dtype), labels, torch.randn(2, 6, 8, 8, dtype=dtype), labels
        losses = []
        for sx, sy, qx, qy in zip(*data, strict=True):
            fast = dict(weights)
            for _ in range(2):
                loss = F.cross_entropy(by_hand(fast, sx), sy)
                grads = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
                fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            losses.append(F.cross_entropy(by_hand(fast, qx), qy))
        for optimizer, loss in zip(optimizers, (maml.meta_loss(*data), torch.stack(losses)), strict=True):
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {}
    for (name, p), start in zip(model.named_parameters(), first, strict=True):
        shifts = name.endswith("0.bias")  # by what the norm after it takes away: its gradient is 0
        assert p.dtype is dtype and (shifts or not torch.equal(p, start))
        assert_same(p, weights[name], **tolerance)


def test_a_shared_norm_with_rows_per_step_stays_as_it_is() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Sequential(norm, nn.Linear(3, 2)))
    maml = MAML(model, 0.1, steps=2, batch_norm="per_step")
    before, x = parts(maml.module), torch.randn(5, 3)
    assert_same(maml(x), maml.module(x))
    assert parts(maml.module) == before


# --- the context of the first call -----------------------------------------------------------------------------------


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [dense, conv])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_of_the_first_call_decides_nothing_about_the_next(
    context: str, make: Callable[[], nn.Module]
) -> None:
    model, data = make(), batch(torch.float32)
    before = parts(model)
    want = MAML(copy.deepcopy(model), 0.1, steps=2, loss="mse").meta_loss(*data)
    maml = MAML(model, 0.1, steps=2, loss="mse")
    CONTEXTS[context](maml, data)
    model.zero_grad()
    loss = maml.meta_loss(*data)
    assert torch.equal(loss, want) and loss.dtype is torch.float32
    assert maml.explain(*data).path == "fused"
    loss.sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and parts(model) == before


@pytest.mark.parametrize("make", [dense, conv])
@pytest.mark.parametrize("inside_first", [True, False])
def test_what_is_traced_under_autocast_is_what_is_traced_outside(
    inside_first: bool, make: Callable[[], nn.Module]
) -> None:
    model, data = make(), batch(torch.float32)
    maml, fused = MAML(model, 0.1, steps=2, loss="mse"), MAML(copy.deepcopy(model), 0.1, steps=2, loss="mse").meta_loss
    for inside in (inside_first, not inside_first, inside_first):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found, explained = maml.meta_loss(*data), maml.explain(*data)
            assert torch.equal(found, fused(*data))
            torch.testing.assert_close(found, plain_loss(model, data), rtol=0.05, atol=0.02)
        assert explained.path == "fused" and ("autocast" in explained.reason) == inside
    torch.set_autocast_enabled("cuda", True)
    try:  # which says nothing about a model on the cpu
        assert "autocast" not in maml.explain(*data).reason
    finally:
        torch.set_autocast_enabled("cuda", False)


@warm
@pytest.mark.parametrize("first", [True, False])
def test_the_general_path_under_activation_checkpointing(first: bool) -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2)).double()
    data, maml = batch(), MAML(model, 0.1, steps=2, loss="mse")
    if not first:
        maml.meta_loss(*data)
    checkpointed(maml, data)
    found = [p.grad for p in model.parameters()]
    assert_same(found, torch.autograd.grad(plain_loss(model, data).sum(), list(model.parameters())))


@warm
def test_a_failure_that_says_nothing_about_the_model_is_not_remembered() -> None:
    class Starved(nn.Linear):
        full = True

        def forward(self, x: Tensor) -> Tensor:
            if Starved.full:
                raise MemoryError("as told")
            return super().forward(x)

    maml, data = MAML(Starved(3, 2), 0.1, loss="mse"), batch(torch.float32)
    with pytest.raises(MemoryError):
        maml.meta_loss(*data)
    Starved.full = False
    assert maml.explain(*data).path == "fused"


def test_fake_and_meta_models_are_traced() -> None:
    with torch.device("meta"):
        model = conv()
    assert len(trace(model, [(3,)]).params) == 6
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert len(trace(conv(), [(3,)]).params) == 6
