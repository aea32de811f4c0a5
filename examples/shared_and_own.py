"""A shared meta-learner and a learner per task, in turn, until it settles: Reptile on sinusoids.

    python examples/shared_and_own.py [--steps 6000] [--out shared_and_own.png]

A round has two halves. First every task's learner starts from the meta-learner and learns its own parameters, all tasks
in one call; then the meta-learner moves a part of the way to their mean (Nichol et al. 2018, arXiv 1803.02999). No
gradient passes from one half to the other. It ends when the tasks' losses have settled. New tasks, 10 points each, are
learned from the meta-learner and, as the baseline, from a fresh network by the same steps.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from sklearn.metrics import mean_squared_error
from torch import Tensor, nn
from tqdm import tqdm

import mtml

WINDOW, TUNING = 500, 32


def learner() -> mtml.Reptile:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return mtml.Reptile(network, lr=0.02, steps=10, loss="mse")


def settled(history: list[float]) -> bool:
    """Whether the last WINDOW rounds took less than 15 % off the loss of the WINDOW before."""
    before, now = sum(history[-2 * WINDOW : -WINDOW]), sum(history[-WINDOW:])
    return len(history) >= 2 * WINDOW and now > 0.85 * before


def train(meta: mtml.Reptile, rounds: int) -> list[float]:
    """The loss of the tasks' learners in their last step, every round."""
    history: list[float] = []
    tasks = mtml.tasks.Sinusoids(shots=20, queries=1, tasks=25, seed=0)
    for batch in (bar := tqdm(itertools.islice(tasks, rounds), total=rounds, unit="round")):
        with torch.no_grad():
            own = meta.adapt_tasks(batch.sx, batch.sy)  # 1. the tasks' parameters, {name: [T, *shape]}
            for name, shared in meta.module.named_parameters():
                shared.lerp_(own.params[name].mean(0), 0.5)  # 2. the meta-learner; `meta.meta_step` does both
        history.append(float(own.support_losses[-1].mean()))
        bar.set_postfix(mse=f"{history[-1]:.3f}", refresh=False)
        if settled(history):
            break
    return history


@torch.no_grad()
def plot(learners: dict[str, mtml.Reptile], history: list[float], errors: dict[str, list[float]], out: Path) -> None:
    """The loss over the rounds, the error over steps on new tasks, and a new task with its learners."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    width = min(50, len(history))
    left.plot(torch.tensor(history).unfold(0, width, 1).mean(1))
    left.set(xlabel="round", ylabel="mean squared error", title=f"the tasks' learners (mean of {width} rounds)")
    line, points = torch.linspace(-5, 5, 200)[:, None], torch.linspace(-4.5, 4.5, 10)[:, None]
    right.plot(line, 3 * torch.sin(line - 1), "k:", label="the task")
    right.plot(points, 3 * torch.sin(points - 1), "k^")
    for name, meta in learners.items():
        middle.plot(errors[name], label=name)
        own = meta.adapt_tasks(points[None], 3 * torch.sin(points - 1)[None], steps=TUNING)
        right.plot(line, own(line[None])[0], label=name)
    middle.set(xlabel="steps of a task's learner", title="new tasks", ylabel="mean squared error", ylim=(0, None))
    right.set(xlabel="x", ylabel="y", title=f"one of them, after {TUNING} steps", ylim=(-9, 4))
    middle.legend()
    right.legend(loc="lower center", fontsize="small")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="rounds at most (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("shared_and_own.png"))
    args = parser.parse_args()
    learners = {"from the meta-learner": learner(), "from a fresh network": learner()}
    history = train(learners["from the meta-learner"], args.steps)
    print(f"{'settled' if settled(history) else 'stopped'} after {len(history)} rounds at MSE {history[-1]:.3f}")
    new = next(mtml.tasks.Sinusoids(shots=10, queries=100, tasks=300, seed=0, stream=1, block=1))
    errors: dict[str, list[float]] = {}
    for name, meta in learners.items():
        with torch.no_grad():
            own = meta.adapt_tasks(new.sx, new.sy, steps=TUNING, keep_steps=True)
            found: list[Tensor] = [own(new.qx, step=k) for k in range(TUNING + 1)]
        errors[name] = [mean_squared_error(new.qy.flatten(), y.flatten()) for y in found]
    own_error, base = (values[-1] for values in errors.values())
    print(f"new tasks, 10 points: MSE {own_error:.2f} after {TUNING} steps (from a fresh network {base:.2f})")
    plot(learners, history, errors, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
