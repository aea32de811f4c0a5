"""Federated averaging, all clients at once: a client is a task, a local step has a batch of its own.

    python examples/federated.py [--steps 60] [--out federated.png]

Clients have unequal amounts of unequal data. Each goes through its own samples once a round, in batches; a client with
fewer batches than the longest gets weights of zero for the rest, steps that move nothing, and a last batch that is not
full gets zeros for what is missing. The server averages the clients' weights by their amounts of data.
What this saves beside a plain loop says `python -m bench run fedavg`. (FedAvg: McMahan et al. 2017, arXiv 1602.05629.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtml

CLASSES, SIDE = 10, 16


class Client(NamedTuple):
    """Images [n, 1, SIDE, SIDE] and labels [n] that stay with their owner."""

    x: Tensor
    y: Tensor


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """An image of each label: a wave in the label's direction, somewhere, in noise; [n, 1, SIDE, SIDE]."""
    line = torch.linspace(-1, 1, SIDE)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    angle = (torch.pi * labels / CLASSES)[:, None, None]
    phase = 6.28 * torch.rand(len(labels), 1, 1, generator=generator)
    wave = torch.sin(7 * (rows * angle.cos() + columns * angle.sin()) + phase)
    return (wave + 0.7 * torch.randn(wave.shape, generator=generator))[:, None]


def clients(count: int, generator: torch.Generator) -> list[Client]:
    """Clients of 5 to 60 samples; each has seen about three classes of the ten."""
    found = []
    for _ in range(count):
        amount = int(torch.randint(5, 61, (), generator=generator))
        classes = torch.randperm(CLASSES, generator=generator)[:3]
        labels = classes[torch.randint(3, (amount,), generator=generator)]
        found.append(Client(draw(labels, generator), labels))
    return found


def one_epoch(crowd: list[Client], batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every client's samples in random order: x [T, K, S, 1, SIDE, SIDE], y [T, K, S] and weights [T, K, S]."""
    steps = max(-(-len(c.y) // batch) for c in crowd)
    x = torch.zeros(len(crowd), steps * batch, 1, SIDE, SIDE)
    y = torch.zeros(len(crowd), steps * batch, dtype=torch.long)
    mask = torch.zeros(len(crowd), steps * batch)
    for i, client in enumerate(crowd):
        order = torch.randperm(len(client.y), generator=generator)
        x[i, : len(order)], y[i, : len(order)], mask[i, : len(order)] = client.x[order], client.y[order], 1.0
    return x.unflatten(1, (steps, batch)), y.unflatten(1, (steps, batch)), mask.unflatten(1, (steps, batch))


@torch.no_grad()
def average(server: mtml.MAML, crowd: list[Client], batch: int, generator: torch.Generator) -> mtml.Adapted:
    """A round: local epochs of all clients from the server's weights, then their average into the server."""
    x, y, mask = one_epoch(crowd, batch, generator)
    adapted = server.adapt_tasks(x, y, steps=x.shape[1], per_step=True, support_mask=mask)
    share = mask.sum((1, 2)) / mask.sum()  # [T]
    for name, parameter in server.module.named_parameters():
        parameter.copy_(torch.einsum("t,t...->...", share, adapted.params[name]))
    return adapted


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )


def plot(crowd: list[Client], history: list[float], out: Path) -> None:
    """Who holds what, and the accuracy of the average over the rounds."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    held = torch.stack([torch.bincount(c.y, minlength=CLASSES) for c in crowd])
    figure.colorbar(left.imshow(held.T, aspect="auto", cmap="Blues"), ax=left)
    left.set(xlabel="client", ylabel="class", title="samples at each client", xticks=range(0, len(crowd), 5))
    right.plot(range(1, len(history) + 1), history)
    right.set(xlabel="round", ylabel="accuracy of the average", title="new images of all classes", ylim=(0, 1))
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="rounds (default %(default)s)")
    parser.add_argument("--clients", type=int, default=20, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("federated.png"))
    args = parser.parse_args()
    generator = torch.manual_seed(0)
    crowd, labels = clients(args.clients, generator), torch.arange(500) % CLASSES
    images, history = draw(labels, generator), []
    server = mtml.MAML(network(), lr=0.1, loss="cross_entropy")
    for _ in (bar := tqdm(range(args.steps), unit="round")):
        own = average(server, crowd, 10, generator)
        history.append(float((server(images).argmax(1) == labels).float().mean()))
        bar.set_postfix(accuracy=f"{history[-1]:.0%}", refresh=False)
    alone = float((own(images.expand(args.clients, *images.shape)).argmax(-1) == labels).float().mean())
    print(f"accuracy after {args.steps} rounds: {history[-1]:.0%} (of a client's weights, not averaged, {alone:.0%})")
    plot(crowd, history, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
