"""Rounding errors of whole float32 loops on images beside PyTorch's own, also where statistics could cancel."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.engine import converted, evaluate
from cases.images import Shape, conv_block, image_case
from test_engine_numerics import errors
from torch import Tensor, nn

from mtml_kernels.losses import LossSpec


def conv4(size: int, *, pooled: bool = True, width: int = 16) -> nn.Module:
    """Four blocks with PyTorch's own initialisation."""
    tail: list[nn.Module] = [nn.ReLU(), nn.MaxPool2d(2)] if pooled else [nn.ReLU()]
    layers: list[nn.Module] = []
    for i in range(4):
        layers += conv_block(width if i else 1, width, *tail, padding=1, stride=1 if pooled else 2)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(width * (-(-size // 16) if not pooled else size // 16) ** 2, 5)
    )


def two_blocks() -> nn.Module:
    """Few layers: an error of the first, whose inputs have the large mean, is not hidden by those of others."""
    layers = [*conv_block(1, 8, nn.ReLU(), nn.MaxPool2d(2)), *conv_block(8, 8, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 9, 5))


def group_norms(width: int = 16) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 5))


class Block(nn.Module):
    """relu(two convolutions + one of a point), halved, as ResNets for few-shot learning have it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        inner = [*conv_block(channels, width, nn.LeakyReLU(0.1), padding=1), *conv_block(width, width, padding=1)]
        self.inner = nn.Sequential(*inner)
        self.shortcut = nn.Sequential(*conv_block(channels, width, kernel=1))
        self.act, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.inner(x) + self.shortcut(x)))


def residual() -> nn.Module:
    return nn.Sequential(Block(3, 8), Block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


NETS: dict[str, tuple[Shape, Callable[[], nn.Module]]] = {
    "conv-4": ((1, 16, 16), lambda: conv4(16)),
    "conv-4, strided": ((1, 20, 20), lambda: conv4(20, pooled=False)),
    "group norm": ((1, 16, 16), group_norms),
    "residual": ((3, 12, 12), residual),
    "two blocks": ((1, 12, 12), two_blocks),
}
SEEDS = range(21)


@pytest.mark.parametrize("offset, rate", [(0.0, 0.1), (30.0, 0.1), (30.0, 1.0)])
@pytest.mark.parametrize("name", NETS)
def test_float32_errors_are_at_most_twice_pytorchs(name: str, offset: float, rate: float) -> None:
    """The median over the seeds of (engine's error / error of the reference in float32), both against float64. Inputs
    around 30 make means much larger than deviations; large rates let second derivatives count.
    """
    shape, make = NETS[name]
    ratios: list[list[float]] = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"tasks": 1, "support": 10, "query": 10, "steps": 1}
        loss = LossSpec("cross_entropy")
        case = image_case(
            make(), shape, rng=random.Random(seed), dtype=torch.float32, loss=loss, lr_scale=rate, **sizes
        )
        case.support_x[0] += offset
        case.query_x[0] += offset
        ones = torch.ones(1)
        exact = evaluate(converted(case, torch.float64), "reference", [ones.double(), None, None], ["params"])
        found = (evaluate(case, backend, [ones, None, None], ["params"]) for backend in ("cpu", "reference"))
        ours, theirs = (errors(results, exact) for results in found)
        ratios.append([a / b for a, b in zip(ours, theirs, strict=True)])
    for group in zip(*ratios, strict=True):
        assert statistics.median(group) <= 2
