"""Another transform for each part of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["TransformDictionary"]


class TransformDictionary:
    """{module or parameter: transform}, as a transform; parameters that are not named have none.

    Raises:
        ValueError: a key is something else.

    Example:
        >>> import torch
        >>> import mtml.compat.learn2learn as l2l
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> transform = l2l.optim.TransformDictionary({net[1]: l2l.optim.MetaCurvatureTransform})
        >>> transform(net[0].weight) is None, transform(net[1].weight).dim
        (True, 2)
    """

    def __init__(self, dictionary: Mapping[nn.Module | nn.Parameter, Callable[..., Any]]) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., Any]] = {}
        for key, transform in dictionary.items():
            if isinstance(key, nn.Module):
                self.param_to_transform |= dict.fromkeys(key.parameters(), transform)
            elif isinstance(key, nn.Parameter):
                self.param_to_transform[key] = transform
            else:
                raise ValueError(f"dictionary: expected modules and parameters as keys, got {type(key).__name__}")

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
