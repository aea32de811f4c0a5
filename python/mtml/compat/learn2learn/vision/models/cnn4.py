"""Perceptrons and convolutional networks of four layers, with the state dicts of learn2learn's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mtml.compat.learn2learn.nn.misc import Flatten, Lambda

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "fc_init_",
    "maml_init_",
]


def fc_init_(module: Any) -> Any:
    """The module, its weight from a normal distribution of deviation 0.01 cut at two of them, its bias zero."""
    if getattr(module, "weight", None) is not None:
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def maml_init_(module: Any) -> Any:
    """The module, its weight by Xavier's uniform distribution, its bias zero."""
    nn.init.xavier_uniform_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class LinearBlock(nn.Module):
    """Linear, batch normalisation by batch statistics, ReLU."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(output_size, momentum=0.999, eps=1e-3, track_running_stats=False)
        self.linear = fc_init_(nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.normalize(self.linear(x)))


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, ReLU, and max-pooling or else a stride of the same size.

    Args:
        kernel_size: of the convolution, with a padding of 1.
        max_pool: pool; without it the convolution has the stride.
        max_pool_factor: half of the pool's, or the stride's, size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        max_pool: bool = True,
        max_pool_factor: float = 1.0,
    ) -> None:
        super().__init__()
        size = int(2 * max_pool_factor)
        self.max_pool = nn.MaxPool2d(size, size) if max_pool else nn.Identity()
        self.normalize = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        stride = 1 if max_pool else size
        self.conv = maml_init_(nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=1))

    def forward(self, x: Tensor) -> Any:
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


class ConvBase(nn.Sequential):
    """`layers` blocks of `hidden` channels, on images [N, channels, H, W]."""

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
    ) -> None:
        widths = [channels] + [hidden] * layers
        super().__init__(*(ConvBlock(i, o, (3, 3), max_pool, max_pool_factor) for i, o in pairwise(widths)))


class OmniglotFC(nn.Module):
    """The perceptron for Omniglot, on images of `input_size` pixels in all.

    Args:
        output_size: classes.
        sizes: hidden layers; None for 256, 128, 64, 64.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.vision.models import OmniglotFC
        >>> OmniglotFC(28 * 28, 5)(torch.ones(3, 1, 28, 28)).shape
        torch.Size([3, 5])

    Paper: Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", 2016.
    """

    def __init__(self, input_size: int, output_size: int, sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        widths = [input_size, *((256, 128, 64, 64) if sizes is None else sizes)]
        blocks = nn.Sequential(*(LinearBlock(i, o) for i, o in pairwise(widths)))
        self.features = nn.Sequential(Flatten(), blocks)
        self.classifier = fc_init_(nn.Linear(widths[-1], output_size))
        self.input_size = input_size

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x))


class OmniglotCNN(nn.Module):
    """The convolutional network for Omniglot, on images of 28 x 28 in any shape.

    Args:
        output_size: classes.
        hidden_size, layers: channels, and how many convolutions.

    Paper: Vinyals et al., "Matching Networks for One Shot Learning", 2016.
    """

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.base = ConvBase(hidden=hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(Lambda(_as_images), self.base, Lambda(_mean_over_space), Flatten())
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x))


def _as_images(x: Tensor) -> Tensor:
    return x.view(-1, 1, 28, 28)


def _mean_over_space(x: Tensor) -> Tensor:
    return x.mean(dim=[2, 3])


class CNN4Backbone(ConvBase):
    """The features of `CNN4`, flattened.

    Args:
        hidden_size, layers, channels, max_pool: as of `CNN4`.
        max_pool_factor: half of the pools' size; None for 4 // layers.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        max_pool_factor: float | None = None,
    ) -> None:
        factor = 4 // layers if max_pool_factor is None else max_pool_factor
        super().__init__(hidden_size, channels, max_pool, layers, factor)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).flatten(1)


class CNN4(nn.Module):
    """The convolutional network for mini-ImageNet, on images [N, 3, 84, 84].

    Args:
        output_size: classes.
        hidden_size, layers, channels: channels within, how many convolutions, channels of the images.
        max_pool: pool, or else convolve with a stride.
        embedding_size: features of an image; None for 25 * hidden_size, as of 84 x 84 pixels.

    Example:
        >>> import torch
        >>> from mtml.compat.learn2learn.vision.models import CNN4
        >>> CNN4(5, hidden_size=32)(torch.ones(2, 3, 84, 84)).shape
        torch.Size([2, 5])

    Paper: Ravi, Larochelle, "Optimization as a Model for Few-Shot Learning", 2017.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        size = 25 * hidden_size if embedding_size is None else embedding_size
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        self.classifier = maml_init_(nn.Linear(size, output_size))
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Any:
        return self.classifier(self.features(x))


MiniImagenetCNN = CNN4
