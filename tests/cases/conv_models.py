"""Convolutional modules for the tests of tracing: what fuses, and what does not with the reason that must be named."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases.program_models import Case, Net, Unfused, module, net, no, no_module, weight
from torch import Tensor, nn


def conv4(channels: int = 1, width: int = 5, *, pooled: bool = True, size: int = 16, **norm: Any) -> nn.Sequential:
    """Four times convolution, batch normalisation, relu, and a halving by pooling or by stride (Finn et al. 2017)."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers.append(nn.Conv2d(width if i else channels, width, 3, padding=1, stride=1 if pooled else 2))
        layers += [nn.BatchNorm2d(width, **norm), nn.ReLU()] + ([nn.MaxPool2d(2)] if pooled else [])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (size // 16) ** 2, 5))


def three_convs(width: int = 6) -> nn.Sequential:
    """The network that higher, TorchOpt and torchbench share; for images of 28 x 28."""
    layers: list[nn.Module] = []
    for channels in (1, width, width):
        layers += [nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width, momentum=1.0, affine=True)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 5))


class ResidualBlock(nn.Module):
    """Three convolutions beside one of a single point, then pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, width, width]
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in sizes)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.act, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            out = self.act(out) if i < 2 else out
        out += self.shortcut(x)
        return self.pool(self.act(out))


def resnet12(*widths: int) -> nn.Sequential:
    blocks = [ResidualBlock(c, w) for c, w in zip((3, *widths), widths, strict=False)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


class FunctionalNorm(nn.Module):
    """F.batch_norm with buffers of its own."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.conv, self.scale, self.by_batch = nn.Conv2d(2, 3, 2), weight(3), training
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.scale, None, training=self.by_batch, eps=1e-3)
        return x.flatten(1)


def _functions(m: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.c.weight, m.c.bias, stride=2, padding=(1, 0))
    x = F.relu(F.group_norm(x, 2, m.w, m.b))
    x = F.max_pool2d(x, 2, stride=1)
    x = (
        F.avg_pool2d(x, 2, 1, ceil_mode=True)
        + F.adaptive_avg_pool2d(x, (None, 3)).mean((2, 3), keepdim=True)[:, :, 0:1]
    )
    return torch.flatten(F.layer_norm(F.instance_norm(x), x.shape[1:]), 1)


def _functions_1d(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool1d(F.conv1d(x, m.c.weight, None, 1, 2, 2), 3, 2, 1)
    x = F.avg_pool1d(x, 2, 1, count_include_pad=False)
    return F.adaptive_avg_pool1d(torch.layer_norm(x, x.shape[-1:]), 2).flatten(1)


def _builtin_norms(m: Any, x: Tensor) -> Tensor:
    x = torch.batch_norm(m.c(x), m.w, m.b, None, None, True, 0.1, 1e-5, True)
    return torch.group_norm(x, 2).mean((-1, -2))


def _squeeze_excite(m: Any, x: Tensor) -> Tensor:
    """A gate for every channel, computed from all points."""
    x = m.c(x)
    gate = torch.sigmoid(m.g(x.mean((2, 3))))
    return (x * gate[:, :, None, None]).flatten(1)


def _last(m: Any, x: Tensor) -> Tensor:
    """Channels last for a while: normalisation and a layer over the channels of every point."""
    x = m.c(x)
    y = m.l(m.n(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return (x + y).flatten(1)


def _points(m: Any, x: Tensor) -> Tensor:
    """Points are folded into the batch; batch normalisation counts them all."""
    return m.n(x.reshape(-1, x.shape[-1])).view(x.shape).flatten(1)


_C = {"c": lambda: nn.Conv2d(2, 4, 3)}
_X = (2, 6, 5)
SPATIAL: dict[str, Case] = {
    "conv": module(lambda: nn.Conv2d(2, 3, 3), _X),
    "conv, strides and paddings": module(lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (0, 2), bias=False), _X),
    "conv, dilated": module(lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3), padding=1), _X),
    "conv, same": module(lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), _X),
    "conv, valid": module(lambda: nn.Conv2d(2, 3, 2, padding="valid"), _X),
    "conv, groups": module(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "conv, depthwise": module(lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 5, 5)),
    "conv of points": module(lambda: nn.Conv2d(2, 3, 1), _X),
    "conv over everything": module(lambda: nn.Sequential(nn.Conv2d(2, 3, (6, 5)), nn.Flatten()), _X),
    "conv, one channel": module(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 1, 2), nn.Flatten()), (1, 6, 5)),
    "conv1d": module(lambda: nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 3, 2)), (2, 9)),
    "conv1d, grouped": module(lambda: nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=4), (4, 7)),
    "max pool": module(lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)), (2, 9, 8)),
    "max pool, dilated": module(lambda: nn.MaxPool2d(2, 1, 1, dilation=(2, 1)), _X),
    "max pool drops the edge": module(lambda: nn.MaxPool2d(2), (2, 5, 7)),
    "max pool 1d": module(lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    "avg pool": module(lambda: nn.AvgPool2d(3, 2, 1), _X),
    "avg pool, edges by their points": module(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), _X),
    "avg pool, ceil": module(lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "avg pool, ceil, points": module(lambda: nn.AvgPool2d((3, 2), 2, (1, 0), True, False), (2, 6, 7)),
    "avg pool, divisor": module(lambda: nn.AvgPool2d(2, 1, divisor_override=3), _X),
    "avg pool 1d": module(lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 8)),
    "adaptive pool": module(lambda: nn.AdaptiveAvgPool2d((4, 2)), _X),
    "adaptive pool, larger": module(lambda: nn.AdaptiveAvgPool2d((None, 7)), _X),
    "adaptive pool 1d": module(lambda: nn.AdaptiveAvgPool1d(3), (2, 8)),
    "group norm": module(lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, eps=1e-3)), _X),
    "group norm of rows": module(lambda: nn.GroupNorm(3, 6, affine=False), (6,)),
    "layer norm": module(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), (3,)),
    "layer norm without bias": module(lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "layer norm of the last of an image": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LayerNorm(4)), _X),
    "layer norm of images": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LayerNorm([3, 5, 4])), _X),
    "layer norm of inputs": module(lambda: nn.LayerNorm(_X), _X),
    "layer norm of space": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.LayerNorm([5, 4])), _X),
    "layer norm, not affine": module(lambda: nn.LayerNorm(_X, elementwise_affine=False), _X),
    "instance norm": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True)), _X),
    "instance norm 1d": module(lambda: nn.InstanceNorm1d(2), (2, 7)),
    "instance norm, in training": module(lambda: nn.InstanceNorm2d(2, track_running_stats=True), _X),
    "functions": net(_functions, (2, 9, 8), w=lambda: weight(4), b=lambda: weight(4), **_C),
    "functions 1d": net(_functions_1d, (2, 12), c=lambda: nn.Conv1d(2, 3, 3, bias=False)),
    "mean over space": net(lambda m, x: m.c(x).mean((2, 3)), _X, **_C),
    "mean over space, kept": net(lambda m, x: m.c(x).mean(dim=(-1, -2), keepdim=True), _X, **_C),
    "mean over lines": net(lambda m, x: m.c(x).mean(-1).mean(2), _X, **_C),
    "mean over columns": net(lambda m, x: torch.mean(m.c(x), 2).flatten(1), _X, **_C),
    "mean over channels": net(lambda m, x: m.c(x).mean(1, keepdim=True), _X, **_C),
    "mean over points": net(lambda m, x: m.a(x).mean(1), (5, 3), a=lambda: nn.Linear(3, 4)),
    "mean over all": net(lambda m, x: m.c(x).mean((1, 2, 3)), _X, **_C),
    "mean of the input": net(lambda m, x: m.a(x.mean((2, 3))), _X, a=lambda: nn.Linear(2, 4)),
    "squeezed": net(lambda m, x: F.adaptive_avg_pool2d(m.c(x), 1).squeeze(-1).squeeze(-1), _X, **_C),
    "flattened space": net(lambda m, x: m.c(x).flatten(2).relu().unflatten(2, (4, 3)).flatten(1), _X, **_C),
    "residual": net(lambda m, x: F.relu(m.c(x) + m.d(x)), _X, d=lambda: nn.Conv2d(2, 4, 3), **_C),
    "residual of the input": net(lambda m, x: x + m.c(x), _X, c=lambda: nn.Conv2d(2, 2, 3, padding=1)),
    "one channel meets many": net(lambda m, x: m.c(x) * m.d(x), _X, d=lambda: nn.Conv2d(2, 1, 3), **_C),
    "channelwise": net(
        lambda m, x: m.c(x) * m.s + m.t, _X, s=lambda: weight(4, 1, 1), t=lambda: weight(1, 4, 1, 1), **_C),
    "pointwise": net(lambda m, x: m.c(x) * m.s + m.t, _X, s=lambda: weight(4, 3), t=lambda: weight(1, 4, 3), **_C),
    "elementwise": net(lambda m, x: m.c(x) * m.s, _X, s=lambda: weight(4, 4, 3), **_C),
    "linewise": net(lambda m, x: m.c(x) * m.s, _X, s=lambda: weight(4, 4, 1), **_C),
    "cat of channels": net(lambda m, x: m.e(torch.cat([m.c(x), m.c(x).relu(), m.d(x)], 1)), _X,
                           d=lambda: nn.Conv2d(2, 1, 3), e=lambda: nn.Conv2d(9, 2, 2), **_C),
    "cat with the input": net(lambda m, x: m.d(torch.cat([x, m.c(x)], 1)), _X,
                              c=lambda: nn.Conv2d(2, 3, 3, padding=1), d=lambda: nn.Conv2d(5, 2, 2)),
    "cat of lines": net(lambda m, x: torch.cat([m.c(x), m.c(x) * 2], 2), _X, **_C),
    "squeeze and excite": net(_squeeze_excite, _X, g=lambda: nn.Linear(4, 4), **_C),
    "channels last": net(_last, _X, n=lambda: nn.LayerNorm(4), l=lambda: nn.Linear(4, 4), **_C),
    "linear over lines": net(lambda m, x: m.a(m.c(x)), _X, a=lambda: nn.Linear(3, 2), **_C),
    "rotated": net(lambda m, x: m.a(m.c(x).permute(0, 3, 1, 2)), _X, a=lambda: nn.Linear(4, 2), **_C),
    "in place": net(lambda m, x: m.c(x).mul_(2.0).add_(m.c(x)).relu_(), _X, **_C),
    "dropout in eval": module(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Dropout2d(0.5), nn.Flatten(), nn.Dropout()).eval(), _X),
    "two images": net(lambda m, x, y: m.c(x) + m.d(y), _X, (1, 6, 5), d=lambda: nn.Conv2d(1, 4, 3), **_C),
    "shared kernel": net(lambda m, x: m.c(m.c(x).relu()), _X, c=lambda: nn.Conv2d(2, 2, 3, padding=1)),
    "shared bias": net(lambda m, x: m.c(x) * m.c.bias[:, None, None], _X, **_C),
    "bias of a buffer": net(
        lambda m, x: F.conv2d(x, m.w, m.z * 2), _X, w=lambda: weight(3, 2, 2, 2), z=lambda: weight(3)),
}  # fmt: skip

NORMED: dict[str, Case] = {  # by batch statistics: several samples
    "batch norm of rows": module(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), (3,)),
    "batch norm of sequences": module(lambda: nn.BatchNorm1d(3, eps=1e-3), (3, 7)),
    "batch norm of images": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)), _X),
    "batch norm, no statistics": module(lambda: nn.BatchNorm2d(2, track_running_stats=False), _X),
    "batch norm, no statistics, in eval": module(lambda: nn.BatchNorm2d(2, track_running_stats=False).eval(), _X),
    "batch norm, not affine": module(lambda: nn.BatchNorm2d(2, affine=False), _X),
    "batch norm in eval": module(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).eval(), _X),
    "batch norm in eval, not affine": module(lambda: nn.BatchNorm1d(3, affine=False).eval(), (3,)),
    "batch norm in eval, of inputs": module(lambda: nn.BatchNorm2d(2).eval(), _X),
    "batch norm of folded points": net(_points, (4, 3), n=lambda: nn.BatchNorm1d(3)),
    "functional batch norm": module(lambda: FunctionalNorm(True), _X),
    "functional batch norm, running": module(lambda: FunctionalNorm(False), _X),
    "computed weight": net(lambda m, x: F.batch_norm(m.c(x), None, None, m.w * 2, m.b, True), _X,
                           w=lambda: weight(4), b=lambda: weight(4), **_C),
    "built-in norms": net(_builtin_norms, _X, w=lambda: weight(4), b=lambda: weight(4), **_C),
    "conv4": module(conv4, (1, 16, 16)),
    "conv4, strided": module(lambda: conv4(3, pooled=False), (3, 16, 16)),
    "conv4, flattened": module(lambda: conv4(size=32), (1, 32, 32)),
    "three convs": module(three_convs, (1, 28, 28)),
    "resnet-12": module(lambda: resnet12(3, 4, 5, 6), (3, 16, 16)),
}  # fmt: skip


def _tracked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, track_running_stats=True)).eval()


UNFUSED: dict[str, Unfused] = {
    "padding mode": no_module(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")),
                              "0 (Conv2d): padding_mode='reflect'", shape=_X),
    "transposed": no_module(lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3)),
                            "0 (ConvTranspose2d): this layer is not fused", shape=_X),
    "indices": no_module(lambda: nn.Sequential(nn.MaxPool2d(2, return_indices=True)),
                         "0 (MaxPool2d): max pooling with return_indices=True", shape=_X),
    "indices, function": no(
        lambda m, x: F.max_pool2d(m.c(x), 2, return_indices=True)[0], "return_indices=True", _X, **_C),
    "adaptive max pool": no(lambda m, x: F.adaptive_max_pool2d(m.c(x), 2), "it is not fused", _X, **_C),
    "instance norm by statistics": no_module(
        _tracked, "1 (InstanceNorm2d): instance normalisation by running statistics", shape=_X),
    "wrong channels": no_module(lambda: nn.Conv2d(3, 2, 3), "expects 3 channels", shape=_X),
    "kernel too large": no_module(lambda: nn.Conv2d(2, 2, 7), "kernel is larger than its input", shape=_X),
    "window too large": no_module(lambda: nn.MaxPool2d(7), "window is larger than its input", shape=_X),
    "no batch": no_module(lambda: nn.Conv2d(2, 2, 1), "it takes a batch [N, C, H, W]", shape=(4, 4)),
    "sequence for an image layer": no_module(lambda: nn.BatchNorm2d(2), "a batch with 4 dimensions", shape=(2, 4)),
    "computed kernel": no(lambda m, x: F.conv2d(x, m.c.weight * 2), "must be a parameter itself", _X, **_C),
    "kernel as a value": no(
        lambda m, x: m.c(x) * m.c.weight.mean(), "only the mean of a sample's own values", _X, **_C),
    "kernel and value": no(lambda m, x: m.c(x) + m.c.weight, "a convolution's weight and as a plain value", (2, 1, 1),
                           c=lambda: nn.Conv2d(2, 1, 1)),
    "frames": no(lambda m, x: m.c(x.flatten(0, 1)), "several points of each sample", (3, *_X), **_C),
    "mean over the batch": no(lambda m, x: m.c(x).mean((0, 2)), "over the samples of the batch", _X, **_C),
    "mean over the middle": no(lambda m, x: x.mean(2), "neither the first nor the last", (2, 3, 4)),
    "computed statistics": no(lambda m, x: F.batch_norm(x, m.z * 2, m.z), "must be buffers themselves", _X,
                              z=lambda: torch.rand(2)),
    "group norm of frames": no(
        lambda m, x: F.group_norm(x.flatten(0, 1), 2), "groups of channels for each sample", (3, 4)),
    "whole tracked net": no_module(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Mish(), nn.BatchNorm2d(3)), "1 (Mish): this layer", shape=_X),
}  # fmt: skip

__all__ = ["NORMED", "SPATIAL", "UNFUSED", "Net", "conv4", "resnet12", "three_convs"]
