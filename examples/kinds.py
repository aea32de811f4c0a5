"""One meta-learner for three kinds of tasks: images, sequences like speech, and recommendation from tables.

    python examples/kinds.py [--steps 300] [--out kinds.png]

Each group of `MultiTaskMAML` has inputs, a head and a loss of its own; to a task's few samples its group's head adapts.
Images: which of three digits (scikit-learn's)? Speech: which of four words, as formants that glide through noise? By a
GRU; a speaker shifts the formants and numbers the words in his own order. Ratings: a user's, from items' features. All
learn at once, weighted by uncertainty; the baseline, the same network before it adapts, can only guess.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor, nn
from tqdm import tqdm

import mtml

TASKS, SHOTS, STEPS, FEATURES = 8, 15, 10, 12


class Listener(nn.Module):
    """Sequences [N, L, 8] -> [N, 32]: a GRU, which is read at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out_features = nn.GRU(8, 32, batch_first=True), 32

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[1][0]


def batches(seed: int, tasks: int) -> Iterator[dict[str, mtml.TaskBatch]]:
    """Endless batches of every group; seeds of the other parity see other drawings, and all the same world."""
    generator, world = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    x, y = load_digits(return_X_y=True)
    drawings = torch.from_numpy(x[seed % 2 :: 2]).float() / 16, y[seed % 2 :: 2]
    images = mtml.tasks.EpisodeDataset(drawings, 3, SHOTS // 3, SHOTS // 3, seed, episodes=10**6)
    traits = torch.randn(FEATURES, 4, generator=world) / 3
    words, time = torch.rand(4, 2, 3, generator=world), torch.linspace(0, 1, 10)[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(tasks, *shape, generator=generator)

    def speech() -> tuple[Tensor, Tensor]:
        """Words [T, N, 10, 8]: loudness in 8 bands over time; their numbers [T, N], in the speaker's order."""
        said = torch.randint(4, (tasks, 2 * SHOTS), generator=generator)
        numbers = torch.rand(tasks, 4, generator=generator).argsort(1)
        ends = words[said] + 0.1 * normal(1, 1, 1)  # of the formants
        formants = torch.lerp(ends[:, :, :1], ends[:, :, 1:], time)  # [T, N, 10, 3]
        bands = torch.exp(-20 * (formants[..., None] - torch.linspace(0, 1, 8)).square()).sum(-2)
        return bands + 0.3 * normal(2 * SHOTS, 10, 8), numbers.gather(1, said)

    for start in itertools.count(0, tasks):
        items = normal(2 * SHOTS, FEATURES)
        rated = torch.tanh(2 * items @ traits) @ normal(4, 1)  # four hidden traits, and what a user makes of them
        drawn = {"speech": speech(), "ratings": (items, rated)}
        halves = {n: (x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]) for n, (x, y) in drawn.items()}
        episodes = mtml.tasks.collate([images[i] for i in range(start, start + tasks)])
        yield {"images": episodes, **{name: mtml.TaskBatch(*each) for name, each in halves.items()}}


@torch.no_grad()
def scores(model: mtml.MultiTaskMAML, test: dict[str, mtml.TaskBatch], steps: int) -> dict[str, float]:
    """Accuracy of each group after so many steps; of ratings the share of their variance that is predicted."""
    found = {}
    for name, batch in test.items():
        out = model.transfer(name, None, batch.sx, batch.sy, steps=steps)(batch.qx)
        y = batch.qy.flatten()
        found[name] = r2_score(y, out.flatten()) if name == "ratings" else accuracy_score(y, out.argmax(-1).flatten())
    return found


def plot(before: dict[str, float], after: dict[str, float], out: Path) -> None:
    """The groups' scores on new tasks."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for shift, values, name in ((-0.2, before, "before adaptation"), (0.2, after, f"after {STEPS} steps")):
        ax.bar([i + shift for i in range(len(values))], values.values(), 0.4, label=name)
    ax.set(title="new tasks: accuracy (ratings: R²)", ylim=(0, 1.25), xticks=range(3), xticklabels=list(after))
    ax.legend(ncol=2)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("kinds.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    widths = {"images": 64, "ratings": FEATURES}
    trunks = {n: nn.Sequential(nn.Linear(w, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh()) for n, w in widths.items()}
    heads = {"images": mtml.Classification(3), "speech": mtml.Classification(4), "ratings": mtml.Regression(1)}
    model = mtml.MultiTaskMAML({**trunks, "speech": Listener()}, heads, lr=0.1, steps=STEPS, weighting="uncertainty")
    source, test = batches(0, TASKS), next(batches(1, 100))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        losses = model.meta_loss(next(source))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{float(losses.total.detach()):.2f}", refresh=False)
    before, after = (scores(model, test, steps) for steps in (0, STEPS))
    for name, found in after.items():
        print(f"{name}: {'R2' if name == 'ratings' else 'accuracy'} {found:.3f} (before adaptation {before[name]:.3f})")
    plot(before, after, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
