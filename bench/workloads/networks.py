"""The networks of the workloads in ``inner``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.workloads import sine_mlp


def client() -> nn.Sequential:
    """The convolutional network of federated simulations (McMahan et al. 2017, arXiv 1602.05629) on 28x28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


def distilled(width: int = 128, size: int = 32) -> nn.Sequential:
    """The ConvNet of dataset distillation (Cazenavette et al. 2022, arXiv 2203.11932) on three-channel images."""
    layers: list[nn.Module] = []
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (size // 8) ** 2, 10))


class ModulatedSiren(nn.Module):
    """A SIREN whose every layer is shifted by a linear map of a latent (functa, Dupont et al. 2022, arXiv 2201.12204).

    The latent [L] is a buffer of zeros: an inner loop fits it to one field, all else is shared.
    """

    def __init__(self, width: int = 256, depth: int = 6, latent: int = 256, out: int = 3, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = w0
        self.latent: Tensor
        self.register_buffer("latent", torch.zeros(latent))
        linears = [m for m in sine_mlp(2, *[width] * depth, out, w0=w0) if isinstance(m, nn.Linear)]
        self.layers, self.last = nn.ModuleList(linears[:-1]), linears[-1]
        self.shifts = nn.ModuleList([nn.Linear(latent, width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:  # [N, 2] -> [N, out]
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            x = torch.sin(self.w0 * (layer(x) + shift(self.latent)))
        result: Tensor = self.last(x)
        return result
