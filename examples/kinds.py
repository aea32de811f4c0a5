"""One meta-learner for four kinds of tasks: images, sequences like speech, ratings and diagnoses.

    python examples/kinds.py [--steps 300] [--out kinds.png]

Each group of `MultiTaskMAML` has inputs, a head and a loss of its own; to a task's few samples its group's head adapts.
Images: which of three digits (scikit-learn's)? Speech: which of four words, as formants that glide through noise? By a
GRU; a speaker shifts the formants and numbers the words in an order of his own. Ratings (a user's) and diagnoses (a
clinic's, three at once): from rows of tables, by one trunk. All learn at once, weighted by uncertainty. The baseline is
the same network before it adapts, which can only guess.
"""

from __future__ import annotations

import argparse
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


def split(x: Tensor, y: Tensor) -> mtml.TaskBatch:
    """The first SHOTS samples of [T, N, ...] to adapt on, the others to be judged on."""
    return mtml.TaskBatch(x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:])


class Source:
    """Endless batches of every group: {group: TaskBatch}."""

    def __init__(self, seed: int, tasks: int) -> None:
        self.generator, self.tasks = torch.Generator().manual_seed(seed), tasks
        x, y = load_digits(return_X_y=True)
        half = slice(seed % 2, None, 2)  # other drawings for each parity of the seed
        drawings = torch.from_numpy(x[half]).float() / 16, y[half]
        self.episodes = mtml.tasks.EpisodeDataset(drawings, 3, SHOTS // 3, 5, seed, episodes=10**6)
        fixed = torch.Generator().manual_seed(0)  # the world is the same for all seeds
        self.taste, self.illness = torch.randn(2, FEATURES, 4, generator=fixed) / 3
        self.words = torch.rand(4, 2, 3, generator=fixed)  # start and end of the formants of four words
        self.drawn = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.tasks, *shape, generator=self.generator)

    def __next__(self) -> dict[str, mtml.TaskBatch]:
        self.drawn += self.tasks
        images = mtml.tasks.collate([self.episodes[i] for i in range(self.drawn - self.tasks, self.drawn)])
        (items, ratings), (patients, scores) = self.rows(self.taste, 1), self.rows(self.illness, 3)
        tables = {"ratings": split(items, ratings), "diagnoses": split(patients, (scores > 0).float())}
        return {"images": images, "speech": self.speech(), **tables}

    def speech(self) -> mtml.TaskBatch:
        """Words [T, N, 10, 8] in bands; a speaker shifts and swaps them: which of the four is it?"""
        said = torch.randint(4, (self.tasks, 2 * SHOTS), generator=self.generator)
        names = torch.stack([torch.randperm(4, generator=self.generator) for _ in range(self.tasks)])
        ends = self.words[said] + 0.1 * self.normal(1, 1, 1)
        time = torch.linspace(0, 1, 10)[:, None]
        formants = ends[:, :, :1] * (1 - time) + ends[:, :, 1:] * time  # [T, N, 10, 3]
        bands = torch.exp(-20 * (formants[..., None] - torch.linspace(0, 1, 8)).square()).sum(-2)
        return split(bands + 0.3 * self.normal(2 * SHOTS, 10, 8), names.gather(1, said))

    def rows(self, causes: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """Rows of a table [T, N, FEATURES], and what a task makes of four hidden causes of them [T, N, outputs]."""
        x = self.normal(2 * SHOTS, FEATURES)
        return x, torch.tanh(2 * x @ causes) @ self.normal(4, outputs)


def learner() -> mtml.MultiTaskMAML:
    table = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
    images = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
    trunks = {"images": images, "speech": Listener(), "ratings": table, "diagnoses": table}
    heads = {"images": mtml.Classification(3), "speech": mtml.Classification(4)}
    heads |= {"ratings": mtml.Regression(1), "diagnoses": mtml.MultiLabel(3)}
    rates = {"images": 0.1, "speech": 0.1, "ratings": 0.1, "diagnoses": 1.0}
    return mtml.MultiTaskMAML(trunks, heads, rates, steps=STEPS, weighting="uncertainty")


@torch.no_grad()
def scores(model: mtml.MultiTaskMAML, test: dict[str, mtml.TaskBatch], steps: int) -> dict[str, float]:
    """Accuracy of each group after so many steps; of ratings the share of their variance that is predicted."""
    found = {}
    for name, batch in test.items():
        out = model.transfer(name, None, batch.sx, batch.sy, steps=steps)(batch.qx).flatten(0, 1)
        y = batch.qy.flatten(0, 1)
        if name == "ratings":
            found[name] = r2_score(y, out)
        else:
            found[name] = accuracy_score(y.flatten(), (out > 0).flatten() if name == "diagnoses" else out.argmax(1))
    return found


def plot(history: list[list[float]], before: dict[str, float], after: dict[str, float], out: Path) -> None:
    """The groups' losses over the meta-steps, and their scores on new tasks."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(history, label=list(after), lw=1)
    left.set(xlabel="meta-step", ylabel="query loss", yscale="log", title="training")
    left.legend()
    place = torch.arange(len(after))
    right.bar(place - 0.2, [max(v, 0) for v in before.values()], 0.4, label="before adaptation")
    right.bar(place + 0.2, after.values(), 0.4, label=f"after {STEPS} steps")
    right.set(title="new tasks: accuracy (ratings: R²)", ylim=(0, 1.3))
    right.set_xticks(place, list(after))
    right.legend(ncol=2)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("kinds.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model, source = learner(), Source(0, TASKS)
    test = next(Source(1, 100))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history: list[list[float]] = []
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        losses = model.meta_loss(next(source))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append([float(loss.detach().mean()) for loss in losses.per_task.values()])
        bar.set_postfix({n: f"{v:.2f}" for n, v in zip(losses.per_task, history[-1], strict=True)}, refresh=False)
    before, after = (scores(model, test, steps) for steps in (0, STEPS))
    for name, score in after.items():
        print(f"{name}: {'R2' if name == 'ratings' else 'accuracy'} {score:.3f} (before adaptation {before[name]:.3f})")
    plot(history, before, after, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
