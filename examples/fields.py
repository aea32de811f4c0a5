"""Neural fields with latent modulations: an image is a latent of a shared SIREN, fitted in three gradient steps.

    python examples/fields.py [--steps 300] [--out fields.png]

The latent shifts the input of every sine and starts at zero for every image; the SIREN, the map from latents to shifts
and a rate for every entry of the latent learn through the three steps. The baseline is an image's mean
colour; `python -m bench run functa` measures the speed. (functa: Dupont et al. 2022, arXiv 2201.12204; COIN++: Dupont
et al. 2022, arXiv 2201.12904; SIREN: Sitzmann et al. 2020, arXiv 2006.09661.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import mtml


class Siren(nn.Module):
    """Colours [N, out] at points [N, 2]; the latent [L] is a buffer, which the inner loop alone changes."""

    def __init__(self, width: int, depth: int, latent: int, out: int = 3, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = w0
        self.register_buffer("latent", torch.zeros(latent))
        self.layers = nn.ModuleList([nn.Linear(width if i else 2, width) for i in range(depth)])
        self.shifts = nn.ModuleList([nn.Linear(latent, width) for _ in range(depth)])
        self.last = nn.Linear(width, out)
        for i, layer in enumerate([*self.layers, self.last]):
            bound = (6 / width) ** 0.5 / w0 if i else 0.5
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            x = torch.sin(self.w0 * (layer(x) + shift(self.latent)))
        return self.last(x)


class Fields(mtml.CAVIA):
    """Fits latents to many fields at once: `meta_loss` trains, `adapt_tasks` encodes, `decode` draws."""

    def __init__(self, width: int = 64, depth: int = 4, latent: int = 64, steps: int = 3, lr: float = 0.1) -> None:
        siren = Siren(width, depth, latent)
        rates = mtml.InnerLR(siren, lr, per="element", params="latent")
        super().__init__(siren, rates, "latent", steps=steps, loss="mse")

    def decode(self, latents: Tensor, points: Tensor) -> Tensor:
        """[T, L] and [T, N, 2] -> [T, N, 3]."""
        return torch.vmap(lambda z, x: functional_call(self.module, {"latent": z}, (x,)))(latents, points)


def images(count: int, side: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of points and colours: coloured discs with soft edges on coloured slopes."""
    line = torch.linspace(-1, 1, side)
    points = torch.cartesian_prod(line, line)  # [N, 2]
    while True:
        centre, radius, sharp = (torch.rand(count, 1, n, generator=generator) for n in (2, 1, 1))
        disc, ground, slope = (torch.rand(count, 1, 3, generator=generator) for _ in range(3))
        away = (points - 1.6 * (centre - 0.5)).norm(dim=-1, keepdim=True)  # [T, N, 1]
        inside = torch.sigmoid((0.2 + 0.5 * radius - away) * (8 + 8 * sharp))
        yield points.expand(count, -1, -1), inside * disc + (1 - inside) * (ground + 0.3 * slope * points[:, :1])


def psnr(error: Tensor) -> float:
    """Decibels of mean squared errors [T], on average."""
    return float((-10 * error.log10()).mean())


def plot(fields: Fields, points: Tensor, colours: Tensor, side: int, out: Path) -> None:
    """Images, what they are after 0 to K steps, and halves of two latents put together."""
    import matplotlib.pyplot as plt

    with torch.no_grad():
        adapted = fields.adapt_tasks(points, colours, keep_steps=True)
        rows = [("image", colours)] + [(f"{k} steps", adapted(points, step=k)) for k in range(fields.steps + 1)]
        between = (adapted.params["latent"] + adapted.params["latent"].roll(1, 0)) / 2
        rows.append(("mean of two", fields.decode(between, points)))
    figure, axes = plt.subplots(len(rows), 6, figsize=(7, 1.2 * len(rows)), layout="constrained")
    for line, (name, drawn) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name)
        for ax, image in zip(line, drawn, strict=False):
            ax.imshow(image.reshape(side, side, 3).clamp(0, 1))
            ax.set(xticks=[], yticks=[])
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (default %(default)s)")
    parser.add_argument("--side", type=int, default=24, help="pixels along a side (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("fields.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    fields = Fields()
    batches = images(16, args.side, torch.Generator().manual_seed(0))
    outer = torch.optim.Adam(fields.parameters(), 1e-3)
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        x, y = next(batches)
        outer.zero_grad()
        loss = fields.meta_loss(x, y, x, y)
        loss.mean().backward()
        outer.step()
        bar.set_postfix(psnr=f"{psnr(loss.detach()):.1f} dB", refresh=False)
    x, y = next(batches)
    own = psnr(fields.meta_loss(x, y, x, y).detach())
    base = psnr((y - y.mean(1, keepdim=True)).square().mean((1, 2)))
    print(f"new images: {own:.1f} dB after {fields.steps} steps (an image's mean colour {base:.1f} dB)")
    plot(fields, x, y, args.side, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
