"""learn2learn's loop over tasks, for `bench.compat`."""

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
    maml = package.algorithms.MAML(model, lr=lr)

    def forward() -> Tensor:
        losses = []
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(F.mse_loss(learner(sx), sy))
            losses.append(F.mse_loss(learner(qx), qy))
        return torch.stack(losses).mean()

    return forward


def engine(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The same by the one line for the batched engine."""
    maml = package.algorithms.MAML(model, lr=lr)

    def forward() -> Tensor:
        losses: Tensor = maml.meta_loss(*tasks, steps=steps, loss="mse")
        return losses.mean()

    return forward


def original(path: Path) -> Any:
    """learn2learn's algorithms from its source tree, without its __init__, which imports gym and torchvision."""
    package = types.ModuleType("learn2learn")
    package.__path__ = [str(path / "learn2learn")]
    sys.modules["learn2learn"] = package
    utils = importlib.import_module("learn2learn.utils")
    package.__dict__.update({name: value for name, value in vars(utils).items() if not name.startswith("_")})
    for name in ("nn", "optim", "algorithms"):
        setattr(package, name, importlib.import_module(f"learn2learn.{name}"))
    return package
