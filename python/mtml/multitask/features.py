"""From a trunk to the rows that a linear head reads: one pass over all samples, a row a sample, pixel or token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mtml.multihead.heads import Head, HeadLayer
from mtml_kernels.checks import shown

__all__ = ["GroupModel", "HeadRows", "as_rows", "pooled", "trunk_width"]

# What a layer's outputs are called, by the names that PyTorch's own layers have for them.
WIDTHS = ("out_features", "out_channels", "embedding_dim", "hidden_size", "num_features")


class GroupModel(nn.Module):
    """A trunk and a head: its tensors are "trunk.*" and "head.*", its output is the head's prediction."""

    head: HeadLayer

    def __init__(self, trunk: nn.Module, head: HeadLayer) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        prediction: Tensor = self.head(pooled(self.head, self.trunk(*args, **kwargs)))
        return prediction

    def features(self, *sets: Any) -> list[Tensor]:
        """Features [T, N, ...] of sets of inputs [T, N, ...], by one pass of the trunk where samples are alike."""
        folded = [pytree.tree_map(lambda t: t.flatten(0, 1), x) for x in sets]
        lead = [pytree.tree_leaves(x)[0].shape[:2] for x in sets]
        if len(sets) == 1 or not _alike(folded):
            found = [self._of_samples(x) for x in folded]
        else:
            both = pytree.tree_map(lambda *parts: torch.cat(parts), *folded)
            found = list(self._of_samples(both).split([math.prod(shape) for shape in lead]))
        return [rows.unflatten(0, tuple(shape)) for rows, shape in zip(found, lead, strict=True)]

    def _of_samples(self, x: Any) -> Tensor:
        args, named = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, list | tuple) else (x,), {})
        return pooled(self.head, self.trunk(*args, **named))


class HeadRows(nn.Module):
    """The head alone on rows of features: [N, D] -> [N, C]. Its tensors have the names that they have in GroupModel."""

    head: HeadLayer

    def __init__(self, head: HeadLayer) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias)


def pooled(layer: HeadLayer, features: Any) -> Tensor:
    """Features as the head takes them: for one prediction a sample, those of pixels or positions are averaged.

    Raises:
        TypeError: the trunk returned no tensor.
        ValueError: a tensor of another rank or width than the head takes.
    """
    head = layer.head
    if not isinstance(features, Tensor) and not hasattr(features, "ndim"):
        raise TypeError(
            f"trunk: expected it to return a tensor of features {head.letters}, got {shown(features)}; wrap it in a "
            "module that picks one, such as output[0] of nn.GRU"
        )
    if head.rank == 2 and features.ndim in (3, 4):
        features = features.mean(1) if features.ndim == 3 else features.mean((2, 3))
    if features.ndim != head.rank or features.shape[head.channels] != layer.in_features:
        raise ValueError(
            f"trunk: expected features {head.letters} with D = {layer.in_features} for {type(head).__name__}, got "
            f"{shown(features)}; another D is said by in_features="
        )
    found: Tensor = features
    return found


def as_rows(head: Head, tensor: Tensor) -> Tensor:
    """[T, N, D], [T, N, D, H, W] or [T, N, L, D] as [T, R, D], one row for each sample, pixel or token."""
    moved = tensor.movedim(2, -1) if head.channels == 1 else tensor
    return moved.flatten(1, -2)


def trunk_width(name: str, trunk: nn.Module) -> int:
    """D of a trunk's features, as its last layer with a width says. Raises ValueError where none does."""
    for module in reversed(list(trunk.modules())):
        for attribute in WIDTHS:
            width = getattr(module, attribute, None)
            if isinstance(width, int):
                return width * (2 if getattr(module, "bidirectional", False) else 1)
    raise ValueError(
        f"in_features: expected the width D of the features of {name}, which no layer of it tells, got none"
    )


def _alike(sets: list[Any]) -> bool:
    """Whether samples of both sets have the same form, shapes and dtypes."""
    leaves, specs = zip(*(pytree.tree_flatten(x) for x in sets), strict=True)
    kinds = [[(tuple(t.shape[1:]), t.dtype) for t in each] for each in leaves]
    return specs[0] == specs[1] and kinds[0] == kinds[1]
