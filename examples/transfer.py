"""A classifier of three layers (128-64-N) learns a list of tasks, saves their weights, and moves on to a new task.

    python examples/transfer.py [--steps 400] [--out transfer.png] [--saved saved_tasks]

The tasks ask of scikit-learn's digits whether they are even, prime, how many loops they have, which third they lie in;
they share two hidden layers and have a head each (`MultiHead`). The new task, which digit it is, has few images. The
saved layers with a new head are fine-tuned beside a network from scratch, on 40 draws of the images at once, each a
task of `adapt_tasks`. Expect them 13 points ahead with one image a digit, one point with twenty.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from tqdm import tqdm

import mtml

TASKS = {  # what is asked, as a class for each digit
    "even": [1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
    "prime": [0, 0, 1, 1, 0, 1, 0, 1, 0, 0],
    "loops": [1, 0, 0, 0, 0, 0, 1, 0, 2, 1],
    "thirds": [0, 0, 0, 1, 1, 1, 2, 2, 2, 2],
}
SHOTS, DRAWS, TUNING = (1, 2, 5, 10, 20), 40, 50


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())


def digits(half: int) -> tuple[Tensor, Tensor]:
    """Every second image [N, 64] and its digit [N]: half 0 for the list of tasks, half 1 for the new task."""
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[half::2]).float() / 16, torch.from_numpy(y[half::2])


def learn(steps: int, folder: Path) -> None:
    """Learn all tasks together and save {trunk, head} of each in a file."""
    x, y = digits(0)
    targets = {name: torch.tensor(classes)[y] for name, classes in TASKS.items()}
    shared = trunk()
    heads = mtml.MultiHead(64, {n: mtml.Classification(max(c) + 1) for n, c in TASKS.items()}, weighting="sum")
    optimizer = torch.optim.Adam([*shared.parameters(), *heads.parameters()], 1e-3)
    for _ in (bar := tqdm(range(steps), unit="step")):
        rows = torch.randint(len(x), (64,))
        losses = heads.loss(shared(x[rows]), {name: t[rows] for name, t in targets.items()})
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{float(losses.total.detach()):.3f}", refresh=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, head in heads.layers.items():
        torch.save({"trunk": shared.state_dict(), "head": head.state_dict()}, folder / f"{name}.pt")


def new_task(shots: int) -> mtml.TaskBatch:
    """Draws of the new task as tasks: `shots` images of each digit to learn from, 50 of each to be judged on."""
    episodes = mtml.tasks.EpisodeDataset(digits(1), 10, shots, 50, seed=1, episodes=DRAWS)
    return mtml.tasks.collate(list(episodes))


@torch.no_grad()
def accuracies(start: dict[str, Tensor] | None, batch: mtml.TaskBatch) -> Tensor:
    """Fine-tune all weights by Adam on every draw; the accuracies [DRAWS]."""
    torch.manual_seed(1)
    model = nn.Sequential(*trunk(), nn.Linear(64, 10))
    if start is not None:
        model.load_state_dict(start, strict=False)  # the head, "4.*", is new
    tuned = mtml.MAML(model, lr=3e-3, steps=TUNING, update=mtml.inner.Adam()).adapt_tasks(batch.sx, batch.sy)
    found = tuned(batch.qx).argmax(-1)
    return torch.tensor([accuracy_score(y, p) for y, p in zip(batch.qy, found, strict=True)])


def plot(found: dict[str, list[Tensor]], out: Path) -> None:
    """Both accuracies over the number of images, with their quartiles."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name, values in found.items():
        low, mean, high = zip(*((v.quantile(0.25), v.mean(), v.quantile(0.75)) for v in values), strict=True)
        ax.plot(SHOTS, mean, "o-", label=name)
        ax.fill_between(SHOTS, low, high, alpha=0.2)
    ax.set(xlabel="labelled images of each digit", ylabel="accuracy", title="the new task: which digit", xscale="log")
    ax.set_xticks(SHOTS, map(str, SHOTS))
    ax.minorticks_off()
    ax.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps of the optimiser (default %(default)s)")
    parser.add_argument("--saved", type=Path, default=Path("saved_tasks"), help="folder of the weights")
    parser.add_argument("--out", type=Path, default=Path("transfer.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    learn(args.steps, args.saved)
    print(f"wrote {', '.join(path.name for path in sorted(args.saved.glob('*.pt')))} to {args.saved}")
    saved = torch.load(args.saved / "even.pt")["trunk"]
    batches = [new_task(shots) for shots in SHOTS]
    found = {
        "transfer": [accuracies(saved, b) for b in batches],
        "from scratch": [accuracies(None, b) for b in batches],
    }
    for shots, own, base in zip(SHOTS, *found.values(), strict=True):
        print(f"{shots:2} images a digit: transfer {own.mean():.1%} (from scratch {base.mean():.1%})")
    plot(found, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
