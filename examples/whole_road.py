"""The whole road: clean, transform and normalise data, build, meta-train, evaluate, draw curves, reuse on a new task.

    python examples/whole_road.py [--steps 300] [--data OMNIGLOT] [--out whole_road.png] [--saved adapted.pt]

Data are scikit-learn's handwritten digits, as from a bad scanner: some pixels are missing, some drawings lost. Tasks ask
which of three digits an image shows, from 5 images of each; MAML learns from tasks on the digits 0 to 6, and is judged on
7, 8 and 9, which it has never seen. The baseline is a linear classifier fitted to the same 15 images. Expect
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import mtml

WAYS, SHOTS, QUERIES, STEPS = 3, 5, 10, 3


def scanned() -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 8, 8] and digits [N] with faults: a tenth of the pixels is missing, a twentieth of the images empty."""
    images, digits = load_digits().images.copy(), load_digits().target
    rng = np.random.default_rng(0)
    images[rng.random(images.shape) < 0.1] = np.nan
    images[rng.random(len(images)) < 0.05] = np.nan
    return images, digits


def clean(images: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop images of which more than a quarter is missing; other missing pixels get the median of their place."""
    kept = np.isnan(images).mean((1, 2)) <= 0.25
    images, digits = images[kept], digits[kept]
    return np.where(np.isnan(images), np.nanmedian(images, 0), images), digits


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images [8 N, 1, 8, 8] and classes [8 N]: each digit in its four turns and their mirror images, classes of their own."""
    found = [torch.rot90(side, k, (2, 3)) for side in (x, x.flip(3)) for k in range(4)]
    return torch.cat(found), torch.cat([y + 10 * i for i in range(8)])


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, WAYS)),
    )


def episodes(x: Tensor, y: Tensor, tasks: int, count: int, seed: int) -> DataLoader[mtml.TaskBatch]:
    data = mtml.tasks.EpisodeDataset((x, y), WAYS, SHOTS, QUERIES, seed=seed, episodes=tasks * count)
    return DataLoader(data, batch_size=tasks, collate_fn=mtml.tasks.collate)


def meta_train(maml: mtml.MAML, loader: DataLoader[mtml.TaskBatch]) -> list[tuple[float, float]]:
    """Query loss and accuracy at every meta-step."""
    optimizer = torch.optim.Adam(maml.parameters(), 2e-3)
    history = []
    for batch in (bar := tqdm(loader, unit="step")):
        found = maml.meta_forward(batch)
        optimizer.zero_grad()
        found.loss.mean().backward()
        optimizer.step()
        right = (found.output.argmax(-1) == batch.qy).float().mean()
        history.append((float(found.loss.detach().mean()), float(right)))
        bar.set_postfix(accuracy=f"{history[-1][1]:.0%}", refresh=False)
    return history


@torch.no_grad()
def evaluate(maml: mtml.MAML, test: mtml.TaskBatch) -> list[float]:
    """Accuracies on new tasks after 0 to 2 STEPS steps."""
    adapted = maml.adapt_tasks(test.sx, test.sy, steps=2 * STEPS, keep_steps=True)
    found = [adapted(test.qx, step=k).argmax(-1) for k in range(2 * STEPS + 1)]
    y = test.qy.flatten()
    print(
        f"recall {recall_score(y, found[STEPS].flatten(), average='macro'):.3f}, "
        f"F1 {f1_score(y, found[STEPS].flatten(), average='macro'):.3f} after {STEPS} steps"
    )
    return [accuracy_score(y, p.flatten()) for p in found]


def linear(test: mtml.TaskBatch) -> float:
    """The accuracy of linear classifiers, each fitted to a task's support images."""
    fits = [LogisticRegression(max_iter=1000).fit(x.flatten(1), y) for x, y in zip(test.sx, test.sy, strict=True)]
    scores = [fit.score(x.flatten(1), y) for fit, x, y in zip(fits, test.qx, test.qy, strict=True)]
    return sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (default %(default)s)")
    parser.add_argument("--saved", type=Path, default=Path("adapted.pt"), help="file of an adapted network")
    parser.add_argument("--out", type=Path, default=Path("whole_road.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    images, digits = scanned()
    kept, labels = clean(images, digits)
    print(f"cleaned: {len(images) - len(kept)} of {len(images)} images dropped")
    x, y = torch.from_numpy(kept).float()[:, None], torch.from_numpy(labels)
    old = y < 7
    x = (x - x[old].mean()) / x[old].std()  # by what is trained on alone
    maml = mtml.MAML(network(), lr=0.1, steps=STEPS)
    history = meta_train(maml, episodes(*turned(x[old], y[old]), 8, args.steps, seed=0))
    test = next(iter(episodes(x[~old], y[~old] - 7, 200, 1, seed=1)))
    found = evaluate(maml, test)
    base = linear(test)
    print(f"digits never seen: accuracy {found[STEPS]:.1%} (linear {base:.1%})")
    # reuse
    torch.save(maml.adapt_tasks(test.sx[:1], test.sy[:1]).task(0).state_dict(), args.saved)
    again = network()
    again.load_state_dict(torch.load(args.saved))
    print(float((again(test.qx[0]).argmax(1) == test.qy[0]).float().mean()))


if __name__ == "__main__":
    main()
