"""TorchOpt's loop over tasks, for `bench.compat`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["engine", "original", "step"]


def step(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The meta-step of a script, forward: -> the mean query loss."""
    inner = package.MetaSGD(model, lr=lr)

    def forward() -> Tensor:
        losses = []
        state = package.extract_state_dict(model, by="reference", detach_buffers=True)
        states = package.extract_state_dict(inner, by="reference")
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            for _ in range(steps):
                inner.step(F.mse_loss(model(sx), sy))
            losses.append(F.mse_loss(model(qx), qy))
            package.recover_state_dict(model, state)
            package.recover_state_dict(inner, states)
        return torch.stack(losses).mean()

    return forward


def engine(package: Any, model: nn.Module, tasks: tuple[Tensor, ...], lr: float, steps: int) -> Callable[[], Tensor]:
    """The same by the one line for the batched engine."""
    inner = package.MetaSGD(model, lr=lr)

    def forward() -> Tensor:
        losses: Tensor = package.meta_loss(model, inner, *tasks, steps=steps, loss="mse")
        return losses.mean()

    return forward


def original(path: Path) -> Any:
    """TorchOpt from its source tree, which needs optree; what it draws graphs with is only imported."""
    if importlib.util.find_spec("graphviz") is None:
        drawing = types.ModuleType("graphviz")
        drawing.__dict__["Digraph"] = object
        sys.modules["graphviz"] = drawing
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("torchopt")
    finally:
        sys.path.remove(str(path))
