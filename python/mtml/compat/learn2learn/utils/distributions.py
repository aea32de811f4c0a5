"""Distributions whose tensors and modules have a history."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from mtml.compat.learn2learn.utils.modules import clone_module, detach_module

__all__ = ["clone_distribution", "detach_distribution"]


def clone_distribution(dist: Any) -> Any:
    """A copy whose tensors and modules are differentiable clones.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn import clone_distribution
        >>> mean = torch.zeros(2, requires_grad=True)
        >>> clone = clone_distribution(torch.distributions.Normal(mean, torch.ones(2)))
        >>> clone.log_prob(torch.ones(2)).sum().backward()
        >>> mean.grad
        tensor([1., 1.])
    """
    return _mapped(dist, lambda tensor: tensor.clone(), clone_module)


def detach_distribution(dist: Any) -> Any:
    """The same distribution, cut from its history, in place."""
    found = _mapped(dist, lambda tensor: tensor.detach(), _detached)
    dist.__dict__.update(found.__dict__)
    return dist


def _detached(module: nn.Module) -> nn.Module:
    detach_module(module)
    return module


def _mapped(dist: Any, tensors: Callable[[Tensor], Tensor], modules: Callable[[nn.Module], nn.Module]) -> Any:
    """A copy with new tensors, where they require grad, and new modules, in distributions within it too."""
    new = copy.copy(dist)
    for name, value in dist.__dict__.items():
        if isinstance(value, Tensor) and value.requires_grad:
            new.__dict__[name] = tensors(value)
        elif isinstance(value, nn.Module):
            new.__dict__[name] = modules(value)
        elif isinstance(value, Distribution):
            new.__dict__[name] = _mapped(value, tensors, modules)
    return new
