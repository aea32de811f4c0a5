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


SEVERITIES = {None: UserWarning, "default": UserWarning, "deprecation": DeprecationWarning}


class _WarnOnce:
    """Each message once.

    Args:
        message: what to say.
        severity: None or "default" (UserWarning), "deprecation", "error" (RuntimeError, at every call), or a class of
            warnings.

    Raises:
        ValueError: another severity.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def __call__(self, message: str, severity: str | type[Warning] | None = None) -> None:
        kind = severity if isinstance(severity, type) else SEVERITIES.get(severity)
        if kind is None and severity != "error":
            raise ValueError(
                f"severity: expected 'default', 'deprecation', 'error' or a class of warnings, got {severity!r}"
            )
        if message in self.warned:
            return
        if kind is None:
            raise RuntimeError(message)
        warnings.warn(message, kind, stacklevel=2)
        self.warned.add(message)  # not where a filter made it an error


warn_once = _WarnOnce()
