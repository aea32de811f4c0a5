"""Random small networks over convolutions, normalisations, poolings, activations, residual sums and concatenations.

`conv_net(seed)` is the same network for the same seed, whatever was drawn before. Every batch statistic covers at least
two points of each sample, so that sets of one sample are valid too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]  # (channels, *space)
Made = tuple[nn.Module, Shape]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d}
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.Tanh, nn.SiLU, nn.GELU, nn.Sigmoid,
]  # fmt: skip


class Channelwise(nn.Module):
    """A factor and a shift for every channel, or for every point."""

    def __init__(self, shape: Shape, points: bool) -> None:
        super().__init__()
        own = (1, *shape[1:]) if points else (shape[0], *(1 for _ in shape[1:]))
        self.scale, self.shift = nn.Parameter(torch.ones(own)), nn.Parameter(torch.zeros(own))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Residual(nn.Module):
    """inner(x) + shortcut(x)."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.inner, self.shortcut = inner, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shortcut(x)


class Dense(nn.Module):
    """x and what is computed from it, side by side."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], dim=1)


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.ndim)))


class LastNorm(nn.Module):
    """Layer normalisation of the channels at every point, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def _out(module: nn.Module, shape: Shape) -> Shape:
    """The shape of a sample's output; batch statistics need two samples where an image is a point."""
    with torch.no_grad():
        return tuple(module(torch.zeros(2, *shape)).shape[1:])


def _conv(rng: random.Random, shape: Shape, out: int | None = None) -> Made:
    channels, *space = shape
    groups = rng.choice([g for g in (1, 1, 1, 2, channels) if channels % g == 0])
    out = out or groups * rng.randint(1, max(1, 6 // groups))
    groups = groups if out % groups == 0 else 1
    kernel = [rng.randint(1, min(3, size)) for size in space]
    dilation = [rng.choice([1, 1, 2]) if 2 * (k - 1) < size else 1 for k, size in zip(kernel, space, strict=True)]
    padding: str | tuple[int, ...] = tuple(rng.randint(0, 1) for _ in space)
    stride = [rng.choice([1, 1, 2]) for _ in space]
    if rng.random() < 0.25:
        padding, stride = rng.choice(["same", "valid"]), [1 for _ in space]
    options = {"padding": padding, "dilation": tuple(dilation), "groups": groups, "bias": rng.random() < 0.5}
    layer = CONVS[len(space)](channels, out, tuple(kernel), tuple(stride), **options)
    return layer, _out(layer, shape)


def _same_conv(rng: random.Random, shape: Shape, out: int) -> nn.Module:
    kernel = rng.choice([1, 2, 3])
    return CONVS[len(shape) - 1](shape[0], out, kernel, padding="same", bias=rng.random() < 0.5)


def _norm(rng: random.Random, shape: Shape) -> Made:
    channels, *space = shape
    if math.prod(space) < 2:
        return nn.Identity(), shape
    dims, eps, affine = len(space), rng.choice([1e-5, 1e-2]), rng.random() < 0.7
    groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    layers: list[Callable[[], nn.Module]] = [
        *[lambda: BATCH_NORMS[dims](channels, eps=eps, affine=affine)] * 2,
        lambda: BATCH_NORMS[dims](channels, eps=eps, affine=affine, track_running_stats=False),
        lambda: nn.GroupNorm(groups, channels, eps=eps, affine=affine),
        lambda: nn.LayerNorm(shape, eps=eps, elementwise_affine=affine),
        lambda: nn.LayerNorm(shape[-1], eps=eps, elementwise_affine=affine),
        lambda: LastNorm(channels),
        lambda: INSTANCE_NORMS[dims](channels, eps=eps, affine=affine),
    ]
    return rng.choice(layers)(), shape


def _pool(rng: random.Random, shape: Shape) -> Made:
    _, *space = shape
    dims = len(space)
    kernel = tuple(rng.randint(1, min(3, size)) for size in space)
    stride = rng.choice([None, tuple(rng.randint(1, 2) for _ in space)])
    padding = tuple(rng.randint(0, k // 2) for k in kernel)
    ceil = rng.random() < 0.3
    kind = rng.choice(["max", "max", "avg", "adaptive"])
    if kind == "max":
        layer = MAX_POOLS[dims](kernel, stride, padding, ceil_mode=ceil)
    elif kind == "avg":
        divisor = {"divisor_override": rng.choice([None, None, 3])} if dims == 2 else {}
        layer = AVG_POOLS[dims](kernel, stride, padding, ceil, rng.random() < 0.5, **divisor)
    else:
        layer = ADAPTIVE_POOLS[dims](tuple(rng.randint(1, size) for size in space))
    return layer, _out(layer, shape)


def _residual(rng: random.Random, shape: Shape) -> Made:
    out = rng.choice([shape[0], rng.randint(1, 5)])
    norm, _ = _norm(rng, (out, *shape[1:]))
    # in place only here: PyTorch itself refuses to overwrite what an activation before it needs for its gradient
    act = rng.choice([*ACTIVATIONS, lambda: nn.ReLU(inplace=True)])()
    inner = nn.Sequential(_same_conv(rng, shape, out), norm, act)
    shortcut = nn.Identity() if out == shape[0] else _same_conv(rng, shape, out)
    return Residual(inner, shortcut), (out, *shape[1:])


def _dense(rng: random.Random, shape: Shape) -> Made:
    out = rng.randint(1, 3)
    return Dense(_same_conv(rng, shape, out)), (shape[0] + out, *shape[1:])


def _channelwise(rng: random.Random, shape: Shape) -> Made:
    return Channelwise(shape, rng.random() < 0.3), shape


def _activation(rng: random.Random, shape: Shape) -> Made:
    return rng.choice(ACTIVATIONS)(), shape


BLOCKS = [_conv, _conv, _conv, _norm, _norm, _pool, _activation, _activation, _residual, _dense, _channelwise]


def _head(rng: random.Random, shape: Shape) -> list[nn.Module]:
    if rng.random() < 0.5:
        return [GlobalMean(), nn.Linear(shape[0], rng.randint(2, 5))]
    return [nn.Flatten(), nn.Linear(math.prod(shape), rng.randint(2, 5))]


def conv_net(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Shape]:
    """(a network in training mode, the shape of one sample); its output is one row of 2 to 5 numbers per sample."""
    rng = random.Random(seed)
    shape: Shape = (rng.randint(1, 3), *(rng.randint(4, 9) for _ in range(rng.choice([1, 2, 2]))))
    first = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(rng.randint(2, 7)):
            make = _conv if i == 0 and rng.random() < 0.7 else rng.choice(BLOCKS)
            layer, shape = make(rng, shape)
            layers.append(layer)
        model = nn.Sequential(*layers, *_head(rng, shape))
        with torch.no_grad():  # weights and biases of normalisations, running statistics: none at its default
            for module in model.modules():
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.is_floating_point():
                        tensor.add_(0.1 * torch.rand_like(tensor))
    return model.to(dtype), first
