"""What is in an image, and where: classification and segmentation on one encoder, weighted by learned uncertainty.

    python examples/segmentation.py [--steps 250] [--out segmentation.png]

Generated images hold a disc, a square or a triangle in noise. One convolutional encoder has two heads, the kind of the
shape and that of every pixel. Weights by homoscedastic uncertainty are learned (Kendall et al. 2018, arXiv 1705.07115);
the baseline are fixed weights of 1. Expect nearly the same of both here: the two losses are of like size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from torch import Tensor, nn
from tqdm import tqdm

import mtml

KINDS, SIDE = ("disc", "square", "triangle"), 20


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Images [N, 1, SIDE, SIDE]; targets kind [N] and pixels [N, SIDE, SIDE], 0 where there is no shape."""
    kind = torch.randint(len(KINDS), (count,), generator=generator)
    size, row, column = torch.rand(3, count, 1, 1, generator=generator).unbind()
    size, line = 4 + 3 * size, torch.arange(SIDE)
    y = line[:, None] - size - (SIDE - 1 - 2 * size) * row  # from the middle of the shape, which lies inside
    x = line - size - (SIDE - 1 - 2 * size) * column
    shapes = [x**2 + y**2 <= size**2, torch.maximum(x.abs(), y.abs()) <= 0.85 * size]
    shapes.append((x.abs() <= (y + size) / 2) & (y <= size))
    inside = torch.stack(shapes)[kind, torch.arange(count)]
    image = inside + 0.5 * torch.randn(inside.shape, generator=generator)
    return image[:, None], {"kind": kind, "pixels": inside * (kind[:, None, None] + 1)}


def block(i: int, o: int, wide: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(i, o, 3, padding=wide, dilation=wide), nn.BatchNorm2d(o, track_running_stats=False), nn.ReLU()


class Model(nn.Module):
    """One encoder for both heads."""

    def __init__(self, weighting: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 4))
        heads = {"kind": mtml.Classification(len(KINDS)), "pixels": mtml.Segmentation(1 + len(KINDS))}
        self.heads = mtml.MultiHead(32, heads, weighting)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of both heads: the mean over the image, and those of every pixel."""
        features = self.encoder(images)
        return {"kind": features.mean((2, 3)), "pixels": features}


def train(weighting: str, steps: int) -> tuple[Model, list[list[float]]]:
    """A trained model, and its heads' losses at every step."""
    torch.manual_seed(0)
    model, generator = Model(weighting), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in (bar := tqdm(range(steps), desc=f"{weighting:11}", unit="step")):
        images, targets = draw(32, generator)
        losses = model.heads.loss(model(images), targets)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append([float(loss.detach()) for loss in losses.per_head.values()])
        bar.set_postfix({name: f"{x:.2f}" for name, x in zip(targets, history[-1], strict=True)}, refresh=False)
    return model, history


def plot(images: Tensor, shown: dict[str, Tensor], history: dict[str, list[list[float]]], out: Path) -> None:
    """Losses over the steps, and what each model sees in new images."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.subplots()
    for style, (weighting, losses) in zip(("-", "--"), history.items(), strict=True):
        for i, name in enumerate(("kind", "pixels")):
            ax.plot([loss[i] for loss in losses], f"C{i}{style}", label=f"{name}, {weighting}", alpha=0.8, lw=1)
    ax.set(xlabel="step", ylabel="cross-entropy of a batch", yscale="log")
    ax.legend()
    for line, (name, drawn) in zip(right.subplots(1 + len(shown), 6), {"image": images, **shown}.items(), strict=True):
        line[0].set_ylabel(name, fontsize="small")
        for cell, image in zip(line, drawn, strict=False):
            cell.imshow(image, **({"cmap": "gray"} if name == "image" else {"vmin": 0, "vmax": 3}))
            cell.set(xticks=[], yticks=[])
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="steps with each weighting (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("segmentation.png"))
    args = parser.parse_args()
    images, targets = draw(300, torch.Generator().manual_seed(1))
    shown, history = {"truth": targets["pixels"]}, {}
    for weighting in ("uncertainty", "sum"):
        model, history[weighting] = train(weighting, args.steps)
        found = {name: logits.argmax(1) for name, logits in model.heads(model(images)).items()}
        accuracy = accuracy_score(targets["kind"], found["kind"])
        f1 = f1_score(targets["kind"], found["kind"], average="macro")
        iou = jaccard_score(targets["pixels"].flatten(), found["pixels"].flatten(), average="macro")
        print(f"{weighting}: accuracy {accuracy:.1%}, macro F1 {f1:.3f}, mean IoU {iou:.3f}")
        shown[weighting] = found["pixels"]
    plot(images[:, 0], shown, history, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
