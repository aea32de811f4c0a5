"""New characters from one drawing each: a convolutional MAML on Omniglot, or on scikit-learn's digits.

    python examples/characters.py [--data PATH] [--steps 600] [--out characters.png]

PATH is a folder with Omniglot's images_background.zip and images_evaluation.zip, or with what is in them. A task shows
one drawing of each of five characters and asks which of them others are: 1200 characters, turned four ways, to train
on, 423 others to be judged by; without --data other drawings of the ten digits. The baseline is the nearest of a
task's five drawings; expect 90 % against 43 % on Omniglot, 96 % against 73 % on digits.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import Tensor, nn
from tqdm import tqdm

import mtml

WAYS, SHOTS, QUERIES, STEPS, FILTERS = 5, 1, 5, 2, 32
TASKS = {"train": 16, "test": 200}


def streams(data: Path | None) -> list[mtml.tasks.ImageEpisodes]:
    """Meta-batches of tasks to train on, and of tasks to be judged by."""
    if data is not None:
        return [mtml.tasks.Omniglot(data, WAYS, SHOTS, QUERIES, tasks, split=name) for name, tasks in TASKS.items()]
    x, y = load_digits(return_X_y=True)
    drawings = np.stack([15 * x[y == digit][:170] for digit in range(10)]).astype(np.uint8)  # [10, 170, 64], ink 240
    parts = zip((drawings[:, :120], drawings[:, 120:]), TASKS.values(), strict=True)
    return [mtml.tasks.ImageEpisodes(part, WAYS, SHOTS, QUERIES, tasks) for part, tasks in parts]


def network(side: int) -> nn.Sequential:
    """Rows of side * side pixels to logits; convolutions halve the image until it is 2 x 2."""
    layers, channels = [nn.Unflatten(1, (1, side, side))], 1
    while side > 2:
        norm = nn.BatchNorm2d(FILTERS, track_running_stats=False)  # of the query set's own statistics, as published
        layers += [nn.Conv2d(channels, FILTERS, 3, stride=2, padding=1), norm, nn.ReLU()]
        channels, side = FILTERS, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(FILTERS * side * side, WAYS))


def meta_train(maml: mtml.MAML, stream: mtml.tasks.ImageEpisodes, steps: int) -> list[float]:
    """Query accuracy at every meta-step."""
    optimizer = torch.optim.Adam(maml.parameters(), 3e-3)
    history = []
    for batch in (bar := tqdm(itertools.islice(stream, steps), total=steps, unit="step")):
        found = maml.meta_forward(batch)
        optimizer.zero_grad()
        found.loss.mean().backward()
        optimizer.step()
        history.append(float((found.output.argmax(-1) == batch.qy).float().mean()))
        bar.set_postfix(accuracy=f"{history[-1]:.0%}", refresh=False)
    return history


def picture(batch: mtml.TaskBatch, found: Tensor, side: int) -> Tensor:
    """The first task, a row a character: the drawing that was shown, then the queries, red where taken wrongly."""
    drawings = torch.cat([part[0].view(WAYS, -1, side, side, 1) for part in (batch.sx, batch.qx)], 1)
    wrong = torch.cat([torch.zeros(WAYS, SHOTS), (found != batch.qy)[0].view(WAYS, QUERIES)], 1)
    colours = 1 - wrong[..., None, None, None] * torch.tensor([0.0, 0.7, 0.7])
    tiles = nn.functional.pad(drawings * colours, (0, 0, 1, 1, 1, 1))
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def plot(history: Sequence[float], curve: Sequence[float], base: float, task: Tensor, out: Path) -> None:
    """Accuracy over meta-steps and over steps of adaptation, and a task."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    width = min(20, len(history))
    axes[0].plot(history, lw=0.5, alpha=0.5)
    axes[0].plot(range(width - 1, len(history)), torch.tensor(history).unfold(0, width, 1).mean(1), "C0")
    axes[0].set(xlabel="meta-step", title="training: query accuracy", ylim=(0, 1))
    axes[1].plot(curve, "o-", label="MAML")
    axes[1].axhline(base, color="C1", label="nearest drawing")
    axes[1].set(xlabel="steps of adaptation", title="new tasks: accuracy", ylim=(0, 1), xticks=range(len(curve)))
    axes[1].legend(loc="lower right")
    axes[2].imshow(task)
    axes[2].set(title="one shown | queries, red: taken wrongly", xticks=[], yticks=[])
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Omniglot's folder; without it scikit-learn's digits")
    parser.add_argument("--steps", type=int, default=600, help="meta-steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("characters.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = streams(args.data)
    side = round(train.images.shape[2] ** 0.5)
    maml = mtml.MAML(network(side), lr=0.4, steps=STEPS)
    history = meta_train(maml, train, args.steps)
    batch, classes = test.batch(0), test.classes(0)  # the class of `test.images` behind each label: [T, WAYS]
    with torch.no_grad():
        adapted = maml.adapt_tasks(batch, steps=2 * STEPS, keep_steps=True)
        found = [adapted(batch.qx, step=k).argmax(-1) for k in range(2 * STEPS + 1)]  # [T, Q] each
    truth, named = (np.take_along_axis(classes, y.numpy(), 1).ravel() for y in (batch.qy, found[STEPS]))
    curve = [accuracy_score(batch.qy.flatten(), labels.flatten()) for labels in found]
    nearest = batch.sy.gather(1, torch.cdist(batch.qx, batch.sx).argmin(-1))
    base = accuracy_score(batch.qy.flatten(), nearest.flatten())
    recall, f1 = (score(truth, named, average="macro") for score in (recall_score, f1_score))
    print(f"new tasks: accuracy {curve[STEPS]:.1%} (nearest drawing {base:.1%})")
    print(f"over {len(np.unique(truth))} characters: recall {recall:.3f}, F1 {f1:.3f}")
    plot(history, curve, base, picture(batch, found[STEPS], side), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
