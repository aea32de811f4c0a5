"""What forward may change of a module, its private copy has for itself; what cannot be copied is shared."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mtml import MAML
from mtml_kernels.program import Unfusable, trace
from mtml_kernels.program.private_copy import PrivateCopy


class Pair(NamedTuple):
    items: list[int]
    name: str


@dataclasses.dataclass
class Config:
    width: int = 1
    items: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slots:
    width: int = 1
    items: list[int] = dataclasses.field(default_factory=list)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> None:
        self.calls += 1


class Attributes(dict[str, Any]):
    """As the configurations of many libraries."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def closure() -> Callable[[], int]:
    found: list[int] = []
    return lambda: found.append(1) or len(found)


def counter(calls: list[int] | None = None) -> Callable[..., int]:
    def count(calls: list[int] = [] if calls is None else calls) -> int:
        calls.append(1)
        return len(calls)

    return count


def loop() -> list[Any]:
    held: list[Any] = [1]
    held.append(held)
    return held


# make, change it in place, see its state
Kind = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]
KINDS: dict[str, Kind] = {
    "list": (lambda: [1], lambda v: v.append(2), list),
    "dict": (lambda: {"a": 1}, lambda v: v.update(b=2), dict),
    "nested": (lambda: {"a": [{"b": [1]}]}, lambda v: v["a"][0]["b"].append(2), repr),
    "ordered": (lambda: collections.OrderedDict(a=1), lambda v: v.update(b=2), repr),
    "default": (lambda: collections.defaultdict(list), lambda v: v["a"].append(1), repr),
    "counter": (lambda: collections.Counter("a"), lambda v: v.update("a"), repr),
    "set": (lambda: {1}, lambda v: v.add(2), set),
    "deque": (lambda: collections.deque([1], maxlen=3), lambda v: v.append(2), repr),
    "tuple": (lambda: ([1], 2), lambda v: v[0].append(2), repr),
    "named tuple": (lambda: Pair([1], "a"), lambda v: v.items.append(2), repr),
    "namespace": (lambda: types.SimpleNamespace(a=[1]), lambda v: v.a.append(2), repr),
    "dataclass": (Config, lambda v: setattr(v, "width", 2), repr),
    "inside a dataclass": (Config, lambda v: v.items.append(2), repr),
    "slots": (Slots, lambda v: v.items.append(2), repr),
    "object": (Counting, lambda v: v.count(), lambda v: v.calls),
    "bound method": (lambda: Counting().count, lambda v: v(), lambda v: v.__self__.calls),
    "dict of a class": (lambda: Attributes(a=[1]), lambda v: v.a.append(2), repr),
    "closure": (closure, lambda v: v(), lambda v: list(v.__closure__[0].cell_contents)),
    "default argument": (counter, lambda v: v(), lambda v: list(v.__defaults__[0])),
    "partial": (lambda: functools.partial(counter(), [1]), lambda v: v(), lambda v: list(v.args[0])),
    "array": (lambda: np.zeros(2), lambda v: v.__iadd__(1), lambda v: v.tolist()),
    "tensor": (lambda: torch.zeros(2), lambda v: v.data.add_(1), lambda v: v.tolist()),
    "random": (lambda: random.Random(0), lambda v: v.random(), lambda v: v.getstate()),
    "numpy's random": (lambda: np.random.default_rng(0), lambda v: v.random(), lambda v: repr(v.bit_generator.state)),
    "generator": (torch.Generator, lambda v: torch.rand(1, generator=v), lambda v: v.get_state().tolist()),
    "circle": (loop, lambda v: v.append(2), len),
    "module in a list": (lambda: [nn.Linear(1, 1)], lambda v: v[0].bias.data.zero_(), lambda v: v[0].bias.item()),
}


class Changes(nn.Linear):
    """Its forward changes what it holds."""

    def __init__(self, held: Any, change: Callable[[Any], Any]) -> None:
        super().__init__(3, 2)
        self.held, self.change = held, change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.held)
        return super().forward(x)


@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_changes_in_place_is_the_copys(kind: str) -> None:
    make, change, state = KINDS[kind]
    other = make()
    before = state(other)
    change(other)
    assert state(other) != before  # or the test could not fail
    held = make()
    before = state(held)
    model = Changes(held, change)
    with suppress(Unfusable):
        trace(model, [(3,)])
    assert model.held is held and state(held) == before


class Once:
    """One for the whole process."""

    the: Any = None

    def __new__(cls) -> Any:
        if cls.the is None:
            cls.the = super().__new__(cls)
        return cls.the


class Owner:
    """Ends something when it is gone."""

    ended = 0

    def __del__(self) -> None:
        Owner.ended += 1


class Refuses:
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is one of me")


def numbers() -> Iterator[int]:
    yield 1


SHARED: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "file": lambda: open(__file__),  # noqa: SIM115
    "running generator": numbers,
    "dataset": lambda: TensorDataset(torch.zeros(3)),
    "singleton": Once,
    "owner": Owner,
    "refuses": Refuses,
    "class": lambda: Counting,
    "module of Python": lambda: np,
    "function": lambda: F.relu,
    "builtin function": lambda: torch.relu,
    "decorated function": lambda: F.max_pool2d,
    "script function": lambda: torch.jit.script(_doubled),
}


def _doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SHARED)
def test_what_has_no_copy_is_shared_alone(kind: str) -> None:
    held, ended = SHARED[kind](), Owner.ended
    model = nn.Linear(3, 2)
    model.held, model.beside = [held, [1]], types.SimpleNamespace(held=held)
    copy = PrivateCopy(model).module
    assert copy.held[0] is held and copy.beside.held is held
    assert copy.held is not model.held and copy.held[1] is not model.held[1] and copy.beside is not model.beside
    del copy
    assert Owner.ended == ended


class Ways(nn.Module):
    """Refers to its parts in roundabout ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.layer.__dict__["parent"] = self
        self.__dict__["weak"] = weakref.ref(self.layer)
        self.act, self.scale = self.shifted, 2.0
        self.steps = [self.layer, lambda x: self.scale * x, functools.partial(self.shifted)]
        self.table = {self.layer: [self.layer.weight]}
        self.helper = types.SimpleNamespace(layer=self.layer)

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.helper.layer.parent.weak()(x)
        for step in self.steps[1:]:
            x = step(x)
        return self.act(x) + self.steps[0].parent.layer.bias


def test_references_lead_to_the_copy() -> None:
    model = Ways()
    copied = PrivateCopy(model, torch.float64)
    copy: Any = copied.module
    assert copy.layer is not model.layer and copy.layer.parent is copy and copy.weak() is copy.layer
    assert copy.act.__self__ is copy and copy.helper.layer is copy.steps[0] is copy.layer
    assert copy.table == {copy.layer: [copy.layer.weight]} and copy.layer.weight.dtype is torch.float64
    assert copied.originals()[id(copy.layer)] is model.layer
    assert copied.originals()[id(copy.layer.weight)] is model.layer.weight
    assert [r["op"] for r in trace(model, [(3,)]).describe()][:3] == ["input", "linear", "affine"]
    model.double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    losses = MAML(model, 0.1, loss="mse").meta_loss(x, x[..., :2], x, x[..., :2])
    assert losses.isfinite().all() and model.layer.weight.dtype is torch.float64


def test_tensors_of_any_kind_are_copied() -> None:
    clone = MAML(nn.BatchNorm1d(3), 0.1).clone().module  # its parameters are results of operations
    copied = PrivateCopy(clone).module
    assert torch.equal(copied.weight, clone.weight) and copied.weight.is_leaf
    assert copied.running_mean.data_ptr() != clone.running_mean.data_ptr()
    freed = nn.Linear(3, 2)
    freed.weight.untyped_storage().resize_(0)
    assert PrivateCopy(freed).module.weight.isfinite().all()
    assert freed.weight.untyped_storage().size() == 0


def test_the_copy_of_a_structure_too_deep_is_given_up() -> None:
    chain: list[Any] = []
    for _ in range(5000):
        chain = [chain]
    model = nn.Linear(3, 2)
    model.chain, model.beside = chain, [1]
    copy = PrivateCopy(model).module
    assert copy.chain is chain and copy.beside is not model.beside
