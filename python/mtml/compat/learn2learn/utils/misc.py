"""Small things that scripts use."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["accuracy", "flatten_config", "magic_box", "warn_once"]


def magic_box(x: Any) -> Any:
    """1, with the gradient of x: exp(x - x.detach()). What is no tensor is returned as it is.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn import magic_box
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> magic_box(x * 2).backward()
        >>> x.grad
        tensor(2.)

    Paper: Foerster et al., "DiCE: The Infinitely Differentiable Monte-Carlo Estimator", 2018.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of rows of preds [N, C] whose largest entry is at targets [N]."""
    return (preds.argmax(dim=1) == targets).float().mean()


def flatten_config(args: Any, prefix: str | None = None) -> dict[str | None, Any]:
    """{"outer.inner": value} of a namespace, a dataclass or a dict that holds such.

    Example:
        >>> from mtml.compat.learn2learn import flatten_config
        >>> flatten_config({"lr": 0.1, "model": {"width": 40}})
        {'lr': 0.1, 'model.width': 40}
    """
    items: Mapping[Any, Any]
    if isinstance(args, argparse.Namespace):
        items = vars(args)
    elif dataclasses.is_dataclass(args):
        items = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    elif isinstance(args, dict):
        items = args
    else:
        return {prefix: args}
    flat: dict[str | None, Any] = {}
    for name, value in items.items():
        flat.update(flatten_config(value, str(name) if prefix is None else f"{prefix}.{name}"))
    return flat


class _WarnOnce:
    """Each message once."""

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def __call__(self, message: str, severity: str | type[Warning] | None = None) -> None:
        if message in self.warned:
            return
        if severity == "error":
            raise RuntimeError(message)
        self.warned.add(message)
        kinds: dict[Any, type[Warning]] = {None: UserWarning, "default": UserWarning, "deprecation": DeprecationWarning}
        warnings.warn(message, kinds[severity] if isinstance(severity, str | None) else severity, stacklevel=2)


warn_once = _WarnOnce()
