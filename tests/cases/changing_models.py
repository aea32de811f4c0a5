"""Ways in which a model can change between two calls: what forward reads, by where it stands and what it is made of."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import fractions
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Change = Callable[[], Any]


class Case(NamedTuple):
    model: nn.Module
    change: Change
    image: bool = False  # takes [N, 2, 6, 6] rather than [N, 3]


class Scaled(nn.Module):
    """A perceptron with a number in it, which `number` takes from somewhere."""

    number: Callable[[Any], float]

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.number()))


def scaled(number: Callable[[Any], Any], **attributes: Any) -> Any:
    """A `Scaled` of a class of its own, so that the class can be changed."""
    kind = type("Own", (Scaled,), {"number": number})
    return kind(**attributes).double()


# --- attributes: what it holds before, how forward gets a number from it, how it changes in place (None: it cannot) ---


class Color(enum.Enum):
    RED = 1.0
    BLUE = 2.5


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Pair(NamedTuple):
    a: float
    b: float


@dataclasses.dataclass
class Config:
    gain: float = 1.0
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    gain: float = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    gain: float = 1.0


class Plain:
    def __init__(self, gain: float) -> None:
        self.gain = gain

    @property
    def doubled(self) -> float:
        return 2.0 * self.gain

    def __call__(self) -> float:
        return self.gain

    def method(self) -> float:
        return self.gain


class ClassHeld:
    gain = 1.0


def _set(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda holder: setattr(holder, name, value)


def _item(key: Any, value: Any) -> Callable[[Any], Any]:
    return lambda holder: holder.__setitem__(key, value)


Get, InPlace = Callable[[Any], Any], Callable[[Any], Any] | None

ATTRIBUTES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Get, InPlace]] = {
    # name: (before, after, number, change in place)
    "float": (lambda: 1.0, lambda: 2.0, lambda s: s.held, None),
    "int": (lambda: 1, lambda: 2, lambda s: s.held, None),
    "bool": (lambda: False, lambda: True, lambda s: 2.0 if s.held else 1.0, None),
    "none": (lambda: None, lambda: 3.0, lambda s: 1.0 if s.held is None else s.held, None),
    "string": (lambda: "low", lambda: "high", lambda s: {"low": 1.0, "high": 2.0}[s.held], None),
    "bytes": (lambda: b"a", lambda: b"abc", lambda s: float(len(s.held)), None),
    "complex": (lambda: 1 + 0j, lambda: 2 + 0j, lambda s: s.held.real, None),
    "fraction": (lambda: fractions.Fraction(1, 2), lambda: fractions.Fraction(3, 2), lambda s: float(s.held), None),
    "float64": (lambda: np.float64(1.0), lambda: np.float64(2.0), lambda s: float(s.held), None),
    "float32": (lambda: np.float32(1.0), lambda: np.float32(2.0), lambda s: float(s.held), None),
    "int64": (lambda: np.int64(1), lambda: np.int64(2), lambda s: float(s.held), None),
    "tuple": (lambda: (1.0, 2.0), lambda: (2.0, 2.0), lambda s: s.held[0], None),
    "range": (lambda: range(2), lambda: range(5), lambda s: float(len(s.held)), None),
    "slice": (lambda: slice(0, 1), lambda: slice(0, 3), lambda s: float(s.held.stop), None),
    "frozenset": (lambda: frozenset({1.0}), lambda: frozenset({1.0, 2.0}), lambda s: sum(s.held), None),
    "enum": (lambda: Color.RED, lambda: Color.BLUE, lambda s: s.held.value, None),
    "int enum": (lambda: Level.LOW, lambda: Level.HIGH, lambda s: float(s.held), None),
    "named tuple": (lambda: Pair(1.0, 0.0), lambda: Pair(2.0, 0.0), lambda s: s.held.a, None),
    "frozen dataclass": (Frozen, lambda: Frozen(2.0), lambda s: s.held.gain, None),
    "list": (lambda: [1.0], lambda: [2.0], lambda s: s.held[0], _item(0, 2.0)),
    "list length": (lambda: [1.0], lambda: [1.0, 1.0], lambda s: sum(s.held), lambda held: held.append(1.0)),
    "dict": (lambda: {"a": 1.0}, lambda: {"a": 2.0}, lambda s: s.held["a"], _item("a", 2.0)),
    "dict key": (
        lambda: {"a": 1.0},
        lambda: {"b": 1.0},
        lambda s: 1.0 if "a" in s.held else 3.0,
        lambda held: held.update({"b": held.pop("a")}),
    ),
    "dict of dicts": (
        lambda: {"a": {"b": 1.0}},
        lambda: {"a": {"b": 2.0}},
        lambda s: s.held["a"]["b"],
        lambda held: held["a"].update(b=2.0),
    ),
    "list in a dict": (
        lambda: {"a": [1.0]},
        lambda: {"a": [2.0]},
        lambda s: s.held["a"][0],
        lambda h: h["a"].sort() or _item(0, 2.0)(h["a"]),
    ),
    "dict in a tuple": (
        lambda: ({"a": 1.0},),
        lambda: ({"a": 2.0},),
        lambda s: s.held[0]["a"],
        lambda h: h[0].update(a=2.0),
    ),
    "set": (lambda: {1.0}, lambda: {3.0}, lambda s: sum(s.held), lambda held: held.add(2.0)),
    "deque": (
        lambda: collections.deque([1.0]),
        lambda: collections.deque([2.0]),
        lambda s: s.held[0],
        lambda h: h.appendleft(2.0),
    ),
    "defaultdict": (
        lambda: collections.defaultdict(float, a=1.0),
        lambda: collections.defaultdict(float, a=2.0),
        lambda s: s.held["a"],
        _item("a", 2.0),
    ),
    "ordered dict": (
        lambda: collections.OrderedDict(a=1.0),
        lambda: collections.OrderedDict(a=2.0),
        lambda s: s.held["a"],
        _item("a", 2.0),
    ),
    "counter": (
        lambda: collections.Counter("a"),
        lambda: collections.Counter("aa"),
        lambda s: float(s.held["a"]),
        _item("a", 3),
    ),
    "chain map": (
        lambda: collections.ChainMap({}, {"a": 1.0}),
        lambda: collections.ChainMap({"a": 2.0}),
        lambda s: s.held["a"],
        _item("a", 2.0),
    ),
    "user dict": (
        lambda: collections.UserDict(a=1.0),
        lambda: collections.UserDict(a=2.0),
        lambda s: s.held["a"],
        _item("a", 2.0),
    ),
    "mapping proxy": (
        lambda: types.MappingProxyType({"a": 1.0}),
        lambda: types.MappingProxyType({"a": 2.0}),
        lambda s: s.held["a"],
        None,
    ),
    "namespace": (
        lambda: types.SimpleNamespace(a=1.0),
        lambda: types.SimpleNamespace(a=2.0),
        lambda s: s.held.a,
        _set("a", 2.0),
    ),
    "argparse": (
        lambda: argparse.Namespace(a=1.0),
        lambda: argparse.Namespace(a=2.0),
        lambda s: s.held.a,
        _set("a", 2.0),
    ),
    "dataclass": (Config, lambda: Config(2.0), lambda s: s.held.gain, _set("gain", 2.0)),
    "nested dataclass": (
        lambda: Config(inner=Config()),
        lambda: Config(inner=Config(2.0)),
        lambda s: s.held.inner.gain,
        lambda held: setattr(held.inner, "gain", 2.0),
    ),
    "slotted dataclass": (Slotted, lambda: Slotted(2.0), lambda s: s.held.gain, _set("gain", 2.0)),
    "object": (lambda: Plain(1.0), lambda: Plain(2.0), lambda s: s.held.gain, _set("gain", 2.0)),
    "object's dict": (lambda: Plain(1.0), lambda: Plain(2.0), lambda s: s.held.gain, _set("__dict__", {"gain": 2.0})),
    "object's property": (lambda: Plain(1.0), lambda: Plain(2.0), lambda s: s.held.doubled, _set("gain", 2.0)),
    "callable object": (lambda: Plain(1.0), lambda: Plain(2.0), lambda s: s.held(), _set("gain", 2.0)),
    "bound method": (
        lambda: Plain(1.0).method,
        lambda: Plain(2.0).method,
        lambda s: s.held(),
        lambda h: _set("gain", 2.0)(h.__self__),
    ),
    "array": (lambda: np.ones(3), lambda: 2.0 * np.ones(3), lambda s: float(s.held[0]), _item(0, 2.0)),
    "array of objects": (
        lambda: np.array([1.0, None], dtype=object),
        lambda: np.array([2.0, None], dtype=object),
        lambda s: s.held[0],
        None,
    ),
    "array in a list": (
        lambda: [np.ones(3)],
        lambda: [2.0 * np.ones(3)],
        lambda s: float(s.held[0][0]),
        lambda h: h[0].fill(2.0),
    ),
    "bytearray": (lambda: bytearray(b"\1"), lambda: bytearray(b"\3"), lambda s: float(s.held[0]), _item(0, 3)),
    "plain tensor": (
        lambda: torch.ones(()),
        lambda: torch.full((), 2.0),
        lambda s: s.held.item(),
        lambda held: held.fill_(2.0),
    ),
    "tensor in a list": (
        lambda: [torch.ones(())],
        lambda: [torch.full((), 2.0)],
        lambda s: s.held[0].item(),
        lambda h: h[0].add_(1.0),
    ),
    "partial": (
        lambda: functools.partial(float, 1.0),
        lambda: functools.partial(float, 2.0),
        lambda s: s.held(),
        None,
    ),
    "partial's keywords": (
        lambda: functools.partial(dict, a=1.0),
        lambda: functools.partial(dict, a=2.0),
        lambda s: s.held()["a"],
        lambda held: held.keywords.update(a=2.0),
    ),
    "lambda": (lambda: lambda: 1.0, lambda: lambda: 2.0, lambda s: s.held(), None),
    "function's default": (
        lambda: _with_default(1.0),
        lambda: _with_default(2.0),
        lambda s: s.held(),
        _set("__defaults__", (2.0,)),
    ),
    "function's keyword default": (
        lambda: _with_keyword(1.0),
        lambda: _with_keyword(2.0),
        lambda s: s.held(),
        lambda held: held.__kwdefaults__.update(a=2.0),
    ),
    "function's code": (
        lambda: _with_default(1.0),
        lambda: _with_default(2.0),
        lambda s: s.held(),
        lambda held: setattr(held, "__code__", (lambda a=1.0: 2.0 * a).__code__),
    ),
    "function's attribute": (
        lambda: _with_attribute(1.0),
        lambda: _with_attribute(2.0),
        lambda s: s.held.gain,
        _set("gain", 2.0),
    ),
    "closure": (
        lambda: _closure()[0],
        lambda: _closure(2.0)[0],
        lambda s: s.held(),
        lambda held: held.__closure__[0].__setattr__("cell_contents", 2.0),
    ),
    "class": (lambda: _own_class(1.0), lambda: _own_class(2.0), lambda s: s.held.gain, _set("gain", 2.0)),
    "child of a module in a list": (
        lambda: [nn.Sequential(nn.Sequential(nn.LeakyReLU(0.1)))],
        lambda: [nn.Sequential(nn.Sequential(nn.LeakyReLU(0.7)))],
        lambda s: 1.0 + s.held[0][0][0].negative_slope,
        lambda held: setattr(held[0][0][0], "negative_slope", 0.7),
    ),
    "child of a module in a list swapped": (
        lambda: [nn.Sequential(nn.LeakyReLU(0.1))],
        lambda: [nn.Sequential(nn.Tanh())],
        lambda s: float(isinstance(s.held[0][0], nn.Tanh)),
        lambda held: held[0].__setitem__(0, nn.Tanh()),
    ),
    "mode of a module in a list": (
        lambda: [nn.Sequential(nn.Dropout(1.0))],
        lambda: [nn.Sequential(nn.Dropout(1.0)).eval()],
        lambda s: 2.0 if s.held[0].training else 1.0,
        lambda held: held[0].eval(),
    ),
    "module in a list": (
        lambda: [nn.LeakyReLU(0.1)],
        lambda: [nn.LeakyReLU(0.7)],
        lambda s: 1.0 + s.held[0].negative_slope,
        lambda held: setattr(held[0], "negative_slope", 0.7),
    ),
}


def _own_class(gain: float) -> type:
    return type("Held", (ClassHeld,), {"gain": gain})


def _with_default(value: float) -> Callable[..., float]:
    def read(a: float = value) -> float:
        return a

    return read


def _with_keyword(value: float) -> Callable[..., float]:
    def read(*, a: float = value) -> float:
        return a

    return read


def _with_attribute(value: float) -> Any:
    def read() -> None:
        return None

    read.gain = value  # type: ignore[attr-defined]
    return read


def _closure(value: float = 1.0) -> tuple[Callable[[], float], Callable[[float], None]]:
    def read() -> float:
        return value

    def write(new: float) -> None:
        nonlocal value
        value = new

    return read, write


def attribute_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, (before, after, number, in_place) in ATTRIBUTES.items():

        def replaced(before: Any = before, after: Any = after, number: Get = number) -> Case:
            model = scaled(number, held=before())
            return Case(model, lambda: setattr(model, "held", after()))

        yield f"{name} replaced", replaced
        if in_place is not None:

            def changed(before: Any = before, number: Get = number, in_place: Any = in_place) -> Case:
                model = scaled(number, held=before())
                return Case(model, lambda: in_place(model.held))

            yield f"{name} in place", changed


# --- names that are no attributes of the module itself ----------------------------------------------------------------

GAIN = 1.0
GAINS = [1.0]
SETTINGS = types.SimpleNamespace(gain=1.0)
TABLE = {"gain": {"deep": 1.0}}
config = types.ModuleType("config")
config.gain = 1.0  # type: ignore[attr-defined]
config.table = {"gain": 1.0}  # type: ignore[attr-defined]


class Globals:
    """Of this file's globals; `restore` puts them back after a test."""

    gain = 1.0


def restore() -> None:
    global GAIN, helper
    GAIN, GAINS[:], SETTINGS.gain, helper = 1.0, [1.0], 1.0, _helper
    TABLE["gain"]["deep"] = 1.0
    config.gain, config.table, Globals.gain = 1.0, {"gain": 1.0}, 1.0  # type: ignore[attr-defined]


def _helper() -> float:
    return GAINS[0]


def _other() -> float:
    return 2.0


helper = _helper


def _write(name: str, value: Any) -> None:
    globals()[name] = value


NAMES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    # name: (number, change(model))
    "global": (lambda s: GAIN, lambda m: _write("GAIN", 2.0)),
    "list in a global": (lambda s: GAINS[0], lambda m: GAINS.__setitem__(0, 2.0)),
    "object in a global": (lambda s: SETTINGS.gain, lambda m: setattr(SETTINGS, "gain", 2.0)),
    "nested dict in a global": (lambda s: TABLE["gain"]["deep"], lambda m: TABLE["gain"].update(deep=2.0)),
    "global of a helper": (lambda s: helper(), lambda m: GAINS.__setitem__(0, 2.0)),
    "helper function": (lambda s: helper(), lambda m: _write("helper", _other)),
    "global by a nested function": (lambda s: (lambda: GAIN)(), lambda m: _write("GAIN", 2.0)),
    "name in a module": (lambda s: config.gain, lambda m: setattr(config, "gain", 2.0)),
    "dict in a module": (lambda s: config.table["gain"], lambda m: config.table.update(gain=2.0)),
    "attribute of a global class": (lambda s: Globals.gain, lambda m: setattr(Globals, "gain", 2.0)),
    "computed name": (lambda s: getattr(s, "ga" + "in"), lambda m: setattr(m, "gain", 2.0)),
    "attribute by its dict": (lambda s: s.__dict__["gain"], lambda m: setattr(m, "gain", 2.0)),
    "attribute by vars": (lambda s: vars(s)["gain"], lambda m: setattr(m, "gain", 2.0)),
    "class attribute": (lambda s: s.shared, lambda m: setattr(type(m), "shared", 2.0)),
    "list in a class attribute": (lambda s: s.shares[0], lambda m: type(m).shares.__setitem__(0, 2.0)),
    "attribute over a class attribute": (lambda s: s.shared, lambda m: setattr(m, "shared", 2.0)),
    "class attribute over a base's": (lambda s: s.inherited, lambda m: setattr(type(m), "inherited", 2.0)),
    "attribute of a base class": (lambda s: s.inherited, lambda m: setattr(type(m).__mro__[1], "inherited", 2.0)),
    "attribute under the default of getattr": (
        lambda s: getattr(s, "absent", 1.0),
        lambda m: setattr(m, "absent", 2.0),
    ),
    "attribute that is deleted": (lambda s: s.shared, lambda m: None),
    "method": (lambda s: s.method(), lambda m: setattr(type(m), "method", lambda self: 2.0)),
    "method on the instance": (lambda s: s.method(), lambda m: setattr(m, "method", lambda: 2.0)),
    "static method": (lambda s: s.static(), lambda m: setattr(type(m), "static", staticmethod(lambda: 2.0))),
    "class method": (lambda s: s.of_class(), lambda m: setattr(type(m), "shared", 2.0)),
    "property": (lambda s: s.computed, lambda m: setattr(m, "gain", 2.0)),
    "property replaced": (lambda s: s.computed, lambda m: setattr(type(m), "computed", property(lambda self: 2.0))),
    "number of children": (lambda s: float(len(list(s.children()))), lambda m: m.add_module("more", nn.Tanh())),
}


def name_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, (number, change) in NAMES.items():

        def make(number: Any = number, change: Any = change, name: str = name) -> Case:
            restore()
            base = type("Base", (Scaled,), {"inherited": 1.0})
            members = {
                "number": number,
                "shared": 1.0,
                "shares": [1.0],
                "method": lambda self: 1.0,
                "static": staticmethod(lambda: 1.0),
                "of_class": classmethod(lambda cls: cls.shared),
                "computed": property(lambda self: self.gain),
            }
            model = type("Own", (base,), members)(gain=1.0).double()
            if name == "attribute that is deleted":
                model.shared = 2.0
                return Case(model, lambda: delattr(model, "shared"))
            return Case(model, lambda: change(model))

        yield name, make
