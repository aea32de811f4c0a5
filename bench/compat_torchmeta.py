"""torchmeta's loop over tasks, for `bench.compat`."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def step(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The meta-step of a script, forward: -> the mean query loss."""
    net, update = _network(package, model), package.utils.gradient_based.gradient_update_parameters

    def forward() -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            params = None
            for _ in range(steps):
                params = update(net, F.mse_loss(net(sx, params=params), sy), params=params, step_size=lr)
            losses.append(F.mse_loss(net(qx, params=params), qy))
        return torch.stack(losses).mean()

    return forward


def engine(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The same by the one line for the batched engine."""
    net = _network(package, model)

    def forward() -> Tensor:
        losses: Tensor = package.meta_loss(net, *tasks, step_size=lr, steps=steps, loss="mse")
        return losses.mean()

    return forward


def original(path: Path) -> Any:
    """torchmeta's modules and its inner step from its source tree, without what needs torchvision and h5py."""
    for name in ("torchmeta", "torchmeta.utils"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(path.joinpath(*name.split(".")))]
    package, utils = sys.modules["torchmeta"], sys.modules["torchmeta.utils"]
    package.__dict__.update(modules=importlib.import_module("torchmeta.modules"), utils=utils)
    utils.__dict__.update(gradient_based=importlib.import_module("torchmeta.utils.gradient_based"))
    return package


def _network(package: Any, model: nn.Module) -> Any:
    """The model in the package's modules, with the same parameters."""
    layers = []
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            own = package.modules.MetaLinear(layer.in_features, layer.out_features)
            own.weight, own.bias = layer.weight, layer.bias
            layers.append(own)
        else:
            layers.append(layer)
    return package.modules.MetaSequential(*layers)
