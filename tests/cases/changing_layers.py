"""Ways in which a model can change between two calls: settings of its layers, and its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases.changing_models import Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

SETTINGS: list[tuple[Callable[[], nn.Module], str, Any]] = [
    # a layer of images [N, 2, 6, 6], an attribute, its new value
    (lambda: nn.Conv2d(2, 2, 3, padding=1), "stride", (2, 2)),
    (lambda: nn.Conv2d(2, 2, 3, padding=1), "padding", (0, 0)),
    (lambda: nn.Conv2d(2, 2, 3, padding=2), "dilation", (2, 2)),
    (lambda: nn.Conv2d(2, 2, 3, padding=1), "padding_mode", "circular"),
    (lambda: nn.Conv2d(2, 2, 3, padding=1), "bias", None),
    (lambda: nn.MaxPool2d(2), "kernel_size", 3),
    (lambda: nn.MaxPool2d(3, 2), "stride", 1),
    (lambda: nn.MaxPool2d(3, 2), "padding", 1),
    (lambda: nn.MaxPool2d(2), "dilation", 2),
    (lambda: nn.MaxPool2d(4, 4), "ceil_mode", True),
    (lambda: nn.AvgPool2d(2), "kernel_size", 3),
    (lambda: nn.AvgPool2d(3, 2), "stride", 1),
    (lambda: nn.AvgPool2d(3, 2), "padding", 1),
    (lambda: nn.AvgPool2d(4, 4), "ceil_mode", True),
    (lambda: nn.AvgPool2d(3, 2, padding=1), "count_include_pad", False),
    (lambda: nn.AvgPool2d(2), "divisor_override", 7),
    (lambda: nn.AdaptiveAvgPool2d(2), "output_size", 3),
    (lambda: nn.AdaptiveAvgPool2d(2), "output_size", (1, 3)),
    (lambda: nn.BatchNorm2d(2), "eps", 0.5),
    (lambda: nn.BatchNorm2d(2).eval(), "eps", 0.5),
    (lambda: nn.BatchNorm2d(2), "training", False),
    (lambda: nn.GroupNorm(1, 2), "num_groups", 2),
    (lambda: nn.GroupNorm(1, 2), "eps", 0.5),
    (lambda: nn.LayerNorm([2, 6, 6]), "eps", 0.5),
    (lambda: nn.InstanceNorm2d(2), "eps", 0.5),
    (lambda: nn.LeakyReLU(0.1), "negative_slope", 0.7),
    (lambda: nn.GELU(), "approximate", "tanh"),
    (lambda: nn.Softplus(), "beta", 3.0),
    (lambda: nn.Softplus(), "threshold", 0.1),
    (lambda: nn.ELU(), "alpha", 3.0),
]


class Pooled(nn.Module):
    """Any layer of images between a convolution and a linear layer that takes images of any size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(2, 2, 3, padding=1), layer, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.sin(self.first(x)))).mean((2, 3)))


class OwnConv(nn.Conv2d):
    """PyTorch's forward by inheritance."""


def setting_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for layer, name, value in [*SETTINGS, (lambda: OwnConv(2, 2, 3, padding=1), "stride", (2, 2))]:

        def make(layer: Any = layer, name: str = name, value: Any = value) -> Case:
            model = Pooled(layer()).double()
            return Case(model, lambda: setattr(model.layer, name, value), image=True)

        yield f"{type(layer()).__name__}.{name}={value}", make


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()


class Switch(nn.Module):
    """The activation is an attribute, as in many a published script."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.act: Any = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Twice(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2.0 * w


def _swap(model: nn.Sequential) -> None:
    model[1], model[3] = model[3], model[1]


def _rename(model: nn.Sequential) -> None:
    """The same children in another order, by names alone."""
    children = list(model._modules.values())
    model._modules.clear()
    for name, child in zip("01234", (children[0], children[3], children[2], children[1], children[4]), strict=True):
        model._modules[name] = child


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


STRUCTURE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "activation by another function": (Switch, lambda m: setattr(m, "act", torch.sigmoid)),
    "activation by a lambda": (Switch, lambda m: setattr(m, "act", lambda x: 2.0 * torch.tanh(x))),
    "activation by an unfused function": (Switch, lambda m: setattr(m, "act", torch.atan)),
    "activation by a module": (Switch, lambda m: setattr(m, "act", nn.ReLU())),
    "submodule": (_net, lambda m: m.__setitem__(1, nn.ReLU())),
    "children swapped": (_net, _swap),
    "children under other names": (_net, _rename),
    "child appended": (_net, lambda m: m.append(nn.Tanh())),
    "child removed": (_net, lambda m: m.__delitem__(3)),
    "parameter": (_net, lambda m: setattr(m[2], "weight", nn.Parameter(torch.ones(4, 4, dtype=torch.float64)))),
    "parameter's data": (_net, lambda m: setattr(m[2].weight, "data", torch.ones(4, 4, dtype=torch.float64))),
    "parameter in place": (_net, lambda m: m[2].weight.data.fill_(1.0)),
    "state dict": (_net, lambda m: m.load_state_dict(_net().state_dict())),
    "bias dropped": (_net, lambda m: setattr(m[2], "bias", None)),
    "weights tied": (_net, lambda m: setattr(m[2], "bias", m[0].bias)),
    "frozen": (_net, lambda m: m[2].requires_grad_(False)),
    "forward hook": (_net, lambda m: m[1].register_forward_hook(_doubled)),
    "forward hook by its table": (_net, lambda m: setattr(m[1], "_forward_hooks", {0: _doubled})),
    "forward pre-hook": (_net, lambda m: m[1].register_forward_pre_hook(lambda module, args: (2.0 * args[0],))),
    "parametrization": (_net, lambda m: parametrize.register_parametrization(m[2], "weight", Double())),
    "weight norm": (_net, lambda m: parametrizations.weight_norm(m[2]).parametrizations.weight.original0.data.mul_(2)),
    "forward of an instance": (_net, lambda m: setattr(m[1], "forward", lambda x: 2.0 * torch.tanh(x))),
    "class of an instance": (_net, lambda m: setattr(m[1], "__class__", Twice)),
    "dropout in train mode": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(1.0), nn.Linear(4, 2)).eval(),
        lambda m: m.train(),
    ),
    "dropout's rate": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2)),
        lambda m: setattr(m[1], "p", 1.0),
    ),
    "mode of batch normalisation": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        lambda m: m.eval(),
    ),
}


def structure_cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    for name, (build, change) in STRUCTURE.items():

        def make(build: Any = build, change: Any = change) -> Case:
            model = build().double()
            return Case(model, lambda: change(model))

        yield name, make
