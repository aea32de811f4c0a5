"""The residual network of twelve layers, with the state dict of learn2learn's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtml.compat.learn2learn.nn.misc import Flatten

__all__ = ["ResNet12", "ResNet12Backbone"]

RAMP = 40_000  # forwards until DropBlock drops at its full rate


def _conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)


class DropBlock(nn.Module):
    """Zeroes squares of `block_size` pixels whose corners are drawn with probability gamma, and scales the rest.

    Paper: Ghiasi, Lin, Le, "DropBlock: A regularization method for convolutional networks", 2018.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        if not self.training:
            return x
        margin = self.block_size - 1
        n, c, height, width = x.shape
        corners = torch.bernoulli(x.new_full((n, c, height - margin, width - margin), gamma))
        kept = 1 - F.max_pool2d(F.pad(corners, (margin,) * 4), self.block_size, stride=1)
        return kept * x * (kept.numel() / kept.sum().clamp(min=1))


class BasicBlock(nn.Module):
    """Three convolutions beside a shortcut, pooled, then dropped out of.

    Args:
        inplanes, planes: channels.
        stride: of the pooling.
        downsample: the shortcut; None for the input itself.
        drop_rate: of dropout, or of DropBlock with `drop_block`, which reaches it after 40 000 forwards.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv3x3(planes, planes)
        self.bn3 = nn.BatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.drop_rate, self.drop_block, self.block_size = drop_rate, drop_block, block_size
        self.forwards = [0]  # in a list, which clones share: a number would count on each clone from the start
        self.DropBlock = DropBlock(block_size)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards[0] += 1
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self._dropped(self.maxpool(self.relu(out + shortcut)))

    def _dropped(self, out: Tensor) -> Tensor:
        if self.drop_rate <= 0:
            return out
        if not self.drop_block:
            return F.dropout(out, self.drop_rate, self.training)
        size, block = out.shape[2], self.block_size
        dropped = self.drop_rate * min(self.forwards[0] / RAMP, 1.0)
        found: Tensor = self.DropBlock(out, dropped / block**2 * size**2 / (size - block + 1) ** 2)
        return found


class ResNet12Backbone(nn.Module):
    """The features of `ResNet12`; arguments as of it."""

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        widths = (64, 160, 320, 640) if wider else (64, 128, 256, 512)
        drop = {"drop_rate": dropblock_dropout, "block_size": dropblock_size}
        self.layer1 = _layer(channels, widths[0], drop_rate=dropblock_dropout)
        self.layer2 = _layer(widths[0], widths[1], drop_rate=dropblock_dropout)
        self.layer3 = _layer(widths[1], widths[2], drop_block=True, **drop)
        self.layer4 = _layer(widths[2], widths[3], drop_block=True, **drop)
        self.avgpool = nn.AvgPool2d(5, stride=1) if avg_pool else nn.Identity()
        self.flatten = Flatten()
        self.dropout = nn.Dropout(embedding_dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Any:
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.dropout(self.flatten(self.avgpool(x)))


def _layer(inputs: int, outputs: int, **drop: Any) -> nn.Sequential:
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, 2, shortcut, **drop))


class ResNet12(nn.Module):
    """A residual network of twelve layers, for images [N, 3, 84, 84].

    Args:
        output_size: classes.
        hidden_size: features of an image; 640 for the defaults, 16 000 without `avg_pool`.
        avg_pool: average over space.
        wider: 64, 160, 320, 640 channels, else 64, 128, 256, 512.
        embedding_dropout: of the features.
        dropblock_dropout, dropblock_size: of dropout in the first two layers, and DropBlock in the others.
        channels: of the images.

    Paper: Lee, Maji, Ravichandran, Soatto, "Meta-Learning with Differentiable Convex Optimization", 2019.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x))
