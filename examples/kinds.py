"""One meta-learner for four kinds of tasks: images, sequences like speech, ratings and diagnoses.

    python examples/kinds.py [--steps 300] [--out kinds.png]

Each group of `MultiTaskMAML` has its own inputs, head and loss. Images (scikit-learn's digits) are told apart in threes;
a speaker's words, drawn as three gliding formants, by a GRU; a user's ratings of items are predicted from the items'
features, a patient group's several diagnoses from measurements, both by one trunk they share. A task is a triple of
digits, a speaker, a user or a clinic: few samples, to which the head of its group adapts. All are learned at once, one
optimiser, weighted by uncertainty. The baseline is the same without adaptation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, mean_squared_error
from torch import Tensor, nn
from tqdm import tqdm

import mtml

TASKS, SHOTS, STEPS, FEATURES = 8, 15, 10, 12


class Listener(nn.Module):
    """Sequences [N, L, 8] -> [N, 32]: a GRU, which is read at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 32, batch_first=True)
        self.out_features = 32

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
        self.episodes = mtml.tasks.EpisodeDataset(
            (torch.from_numpy(x[half]).float() / 16, y[half]), 3, SHOTS // 3, 5, seed, episodes=10**6
        )
        fixed = torch.Generator().manual_seed(0)  # the world is the same for all seeds
        self.taste, self.illness = torch.randn(2, 4, FEATURES, generator=fixed) / 3
        self.words = torch.rand(4, 2, 3, generator=fixed)  # start and end of the formants of four words
        self.drawn = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.tasks, *shape, generator=self.generator)

    def __next__(self) -> dict[str, mtml.TaskBatch]:
        self.drawn += self.tasks
        images = mtml.tasks.collate([self.episodes[i] for i in range(self.drawn - self.tasks, self.drawn)])
        return {"images": images, "speech": self.speech(), "ratings": self.ratings(), "diagnoses": self.diagnoses()}

    def speech(self) -> mtml.TaskBatch:
        """Words [T, N, 10, 8] in bands; a speaker shifts and swaps them: which of the four is it?"""
        said = torch.randint(4, (self.tasks, 2 * SHOTS), generator=self.generator)
        names = torch.stack([torch.randperm(4, generator=self.generator) for _ in range(self.tasks)])
        ends = self.words[said] + 0.1 * self.normal(1, 1, 1)
        time = torch.linspace(0, 1, 10)[:, None]
        formants = ends[:, :, :1] * (1 - time) + ends[:, :, 1:] * time  # [T, N, 10, 3]
        bands = torch.exp(-20 * (formants[..., None] - torch.linspace(0, 1, 8)).square()).sum(-2)
        return split(bands + 0.3 * self.normal(2 * SHOTS, 10, 8), names.gather(1, said))

    def ratings(self) -> mtml.TaskBatch:
        """Items [T, N, FEATURES] with hidden traits; a user weighs these: ratings [T, N, 1]."""
        items = self.normal(2 * SHOTS, FEATURES)
        traits = torch.tanh(2 * items @ self.taste.T)
        return split(items, traits @ self.normal(4, 1) + 0.1 * self.normal(2 * SHOTS, 1))

    def diagnoses(self) -> mtml.TaskBatch:
        """Measurements [T, N, FEATURES] with hidden causes; a clinic's three diagnoses of them [T, N, 3]."""
        measured = self.normal(2 * SHOTS, FEATURES)
        causes = torch.tanh(2 * measured @ self.illness.T)
        return split(measured, (causes @ self.normal(4, 3) > 0).float())


def learner() -> mtml.MultiTaskMAML:
    table = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
    images = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
    trunks = {"images": images, "speech": Listener(), "ratings": table, "diagnoses": table}
    heads = {
        "images": mtml.Classification(3),
        "speech": mtml.Classification(4),
        "ratings": mtml.Regression(1),
        "diagnoses": mtml.MultiLabel(3),
    }
    return mtml.MultiTaskMAML(trunks, heads, lr=0.1, steps=STEPS, weighting="uncertainty")


@torch.no_grad()
def scores(model: mtml.MultiTaskMAML, test: dict[str, mtml.TaskBatch], steps: int) -> dict[str, float]:
    """Accuracy of each group after so many steps; of ratings the mean squared error."""
    found = {}
    for name, batch in test.items():
        out = model.transfer(name, None, batch.sx, batch.sy, steps=steps)(batch.qx).flatten(0, 1)
        y = batch.qy.flatten(0, 1)
        if name == "ratings":
            found[name] = mean_squared_error(y, out)
        else:
            found[name] = accuracy_score(y.flatten(), (out > 0).flatten() if name == "diagnoses" else out.argmax(1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("kinds.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model, source = learner(), Source(0, TASKS)
    test = next(Source(1, 100))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        losses = model.meta_loss(next(source))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        bar.set_postfix({n: f"{float(v.detach().mean()):.2f}" for n, v in losses.per_task.items()}, refresh=False)
    print(scores(model, test, 0), scores(model, test, STEPS))


if __name__ == "__main__":
    main()
