"""The wide residual network of 28 layers, with the state dict of learn2learn's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WRN28", "WRN28Backbone"]


class WideBlock(nn.Module):
    """Two convolutions, each after batch normalisation and ReLU, beside a shortcut."""

    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(dropout_rate)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride))

    def forward(self, x: Tensor) -> Any:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WRN28Backbone(nn.Module):
    """The features of `WRN28` [N, 640].

    Args:
        dropout: between the convolutions of each block.
        depth, widen_factor: 6 blocks' layers and 4, and how much wider than 16 channels.

    Raises:
        ValueError: a depth that is not 6 n + 4.
    """

    def __init__(self, dropout: float = 0.0, *, depth: int = 28, widen_factor: int = 10) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth: expected 6 n + 4, got {depth}")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=3, padding=1)
        self.layer1 = _layer(widths[0], widths[1], blocks, dropout, stride=1)
        self.layer2 = _layer(widths[1], widths[2], blocks, dropout, stride=2)
        self.layer3 = _layer(widths[2], widths[3], blocks, dropout, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3], momentum=0.9)

    def forward(self, x: Tensor) -> Any:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.avg_pool2d(F.relu(self.bn1(out)), 21).flatten(1)


def _layer(inputs: int, outputs: int, blocks: int, dropout: float, stride: int) -> nn.Sequential:
    first = WideBlock(inputs, outputs, dropout, stride)
    return nn.Sequential(first, *(WideBlock(outputs, outputs, dropout) for _ in range(blocks - 1)))


class WRN28(nn.Module):
    """A wide residual network of 28 layers, for images [N, 3, 84, 84].

    Args:
        output_size: classes.
        hidden_size: features of an image.
        dropout: between the convolutions of each block.

    Paper: Zagoruyko, Komodakis, "Wide Residual Networks", 2016.
    """

    def __init__(self, output_size: int, hidden_size: int = 640, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = WRN28Backbone(dropout)
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x))
