"""The canonical meta-learning workloads: networks, shapes, and random data from fixed seeds.

A workload is one MAML meta-step: ``tasks`` tasks of ``support`` and ``query`` samples, ``steps`` inner steps of
gradient descent at rate ``lr``, the mean query loss over the tasks, and its exact second-order gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""sx [T, S, *x], sy [T, S] or [T, S, out], qx [T, Q, *x], qy [T, Q] or [T, Q, out]"""


class BatchStatNorm2d(nn.BatchNorm2d):
    """BatchNorm that always normalises by the statistics of its batch (the few-shot convention)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)


class Sine(nn.Module):
    """sin(w0 * x), the activation of SIREN (Sitzmann et al. 2020, arXiv 2006.09661)."""

    def __init__(self, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A multi-layer perceptron; no activation after the last layer."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def sine_mlp(*sizes: int, w0: float = 30.0) -> nn.Sequential:
    """An MLP with sine activations and SIREN's initial weights."""
    net = mlp(*sizes, activation=lambda: Sine(w0))
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for i, layer in enumerate(linears):
            bound = 1 / layer.in_features if i == 0 else math.sqrt(6 / layer.in_features) / w0
            layer.weight.uniform_(-bound, bound)
    return net


def convnet(
    channels: int,
    width: int,
    features: int,
    classes: int,
    *,
    depth: int = 4,
    stride: int = 1,
    pad: int = 1,
    pool: bool = True,
) -> nn.Sequential:
    """``depth`` blocks of conv 3x3, BatchNorm on batch statistics, ReLU (and max-pool 2), then a linear head."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(channels if i == 0 else width, width, 3, stride, pad), BatchStatNorm2d(width), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


@dataclass(frozen=True)
class Workload:
    """One meta-step. ``inputs``: the gradient is taken with respect to sx and qx too."""

    name: str
    network: str
    build: Callable[[], nn.Module]
    tasks: int
    support: int
    query: int
    x: tuple[int, ...]
    out: int
    steps: int
    lr: float
    loss: str = "cross_entropy"
    scale: float = 1.0
    inputs: bool = False


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("sinusoid", "MLP 1-40-40-1, ReLU", lambda: mlp(1, 40, 40, 1), 25, 10, 10, (1,), 1, 5, 0.01, "mse"),
        Workload(
            "omniglot_mlp",
            "MLP 784-256-128-64-64-5, ReLU",
            lambda: mlp(784, 256, 128, 64, 64, 5),
            32,
            5,
            75,
            (784,),
            5,
            1,
            0.4,
        ),
        Workload(
            "siren", "MLP 2-64-64-64-3, ReLU", lambda: mlp(2, 64, 64, 64, 3), 8, 1024, 1024, (2,), 3, 3, 0.01, "mse"
        ),
        Workload(
            "siren_sine",
            "MLP 2-64-64-64-3, sine",
            lambda: sine_mlp(2, 64, 64, 64, 3),
            8,
            1024,
            1024,
            (2,),
            3,
            3,
            0.01,
            "mse",
        ),
        Workload(
            "anil_head",
            "linear 1600-5 on given features",
            lambda: mlp(1600, 5),
            32,
            25,
            75,
            (1600,),
            5,
            10,
            0.1,
            scale=0.3,
            inputs=True,
        ),
        Workload(
            "omniglot_conv",
            "4 x conv 64 stride 2, BatchNorm, ReLU; linear 256-5",
            lambda: convnet(1, 64, 256, 5, stride=2, pool=False),
            32,
            5,
            75,
            (1, 28, 28),
            5,
            1,
            0.4,
        ),
        Workload(
            "mini_conv",
            "4 x conv 32, BatchNorm, ReLU, max-pool; linear 800-5",
            lambda: convnet(3, 32, 800, 5),
            4,
            5,
            75,
            (3, 84, 84),
            5,
            5,
            0.01,
        ),
        Workload(
            "l2l_higher_omniglot",
            "3 x conv 64, BatchNorm, ReLU, max-pool; linear 64-5",
            lambda: convnet(1, 64, 64, 5, depth=3, pad=0),
            32,
            25,
            75,
            (1, 28, 28),
            5,
            5,
            0.1,
        ),
        Workload("tiny_mlp", "MLP 8-8-3, ReLU", lambda: mlp(8, 8, 3), 4, 6, 6, (8,), 3, 1, 0.1),
        Workload(
            "tiny",
            "MLP 3-8-2, tanh (checks the harness; not a measurement)",
            lambda: mlp(3, 8, 2, activation=nn.Tanh),
            3,
            4,
            5,
            (3,),
            2,
            2,
            0.05,
            "mse",
        ),
    )
}


def make_network(w: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The workload's network; equal weights for equal seeds whatever the dtype."""
    torch.manual_seed(7 + seed)
    return w.build().to(device, dtype)


def make_data(w: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Data:
    """Random support and query sets; equal values for equal seeds whatever the dtype."""
    generator = torch.Generator().manual_seed(1 + seed)

    def x(n: int) -> Tensor:
        values = torch.randn(w.tasks, n, *w.x, generator=generator) * w.scale
        return values.to(device, dtype).requires_grad_(w.inputs)

    def y(n: int) -> Tensor:
        if w.loss == "mse":
            return torch.randn(w.tasks, n, w.out, generator=generator).to(device, dtype)
        return torch.randint(0, w.out, (w.tasks, n), generator=generator).to(device)

    return x(w.support), y(w.support), x(w.query), y(w.query)


def to_channels_last(net: nn.Module, data: Data) -> tuple[nn.Module, Data]:
    """The same network and images with channels innermost in memory: oneDNN's fast layout on the CPU."""
    sx, sy, qx, qy = data

    def images(x: Tensor) -> Tensor:  # [T, N, C, H, W]
        flat = x.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, x.shape[:2]).requires_grad_(x.requires_grad)

    if sx.dim() != 5:
        raise ValueError(f"channels_last needs image workloads (sx of 5 dimensions), got sx of shape {tuple(sx.shape)}")
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net, (images(sx), sy, images(qx), qy)


def wanted(w: Workload, params: Iterable[Tensor], data: Data) -> list[Tensor]:
    """What the meta-gradient is taken for: the parameters, and the inputs where the workload says so."""
    return list(params) + ([data[0], data[2]] if w.inputs else [])


def select(names: Iterable[str]) -> list[Workload]:
    """The workloads of these names, in order. Raises ValueError naming the unknown one and the choices."""
    chosen = []
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}; got {name!r}")
        chosen.append(WORKLOADS[name])
    return chosen
