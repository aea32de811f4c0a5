"""Sinusoids from ten points: MAML of a network of 40 units, shared features with a head per task, and one for all.

    python examples/regression.py [--steps 2000] [--out regression.png]

A task is a sinusoid with an amplitude and a phase of its own (Finn et al. 2017, arXiv 1703.03400). Three ways, trained
on the same tasks: `MAML` changes all weights for a task; feature sharing takes every task's features relu(W^T x_t + b)
from the same two layers and changes the linear head alone (`params=`; Raghu et al. 2020, arXiv 1909.09157); a network
that is never adapted learns the mean over tasks, the baseline at an error of 3. Expect 0.8 and 1.1 after one step, 0.3
and 0.5 after ten.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtml

STEPS = 10  # of adaptation to new tasks; training goes through 1 or 0


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def learners() -> dict[str, mtml.MAML]:
    """The three ways, from the same initial weights."""
    found = {}
    for name, params, steps in (("MAML", None, 1), ("shared features", "4.*", 1), ("never adapted", None, 0)):
        torch.manual_seed(0)
        found[name] = mtml.MAML(network(), lr=0.01, steps=steps, loss="mse", params=params)
    return found


def meta_train(maml: mtml.MAML, tasks: mtml.tasks.Sinusoids, steps: int, name: str) -> list[float]:
    """The query loss at every meta-step."""
    optimizer = torch.optim.Adam(maml.parameters(), 2e-3)
    history = []
    bar = tqdm(itertools.islice(tasks, steps), total=steps, desc=f"{name:15}", unit="step")
    for batch in bar:
        loss = maml.meta_loss(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
        bar.set_postfix(mse=f"{history[-1]:.2f}", refresh=False)
    return history


@torch.no_grad()
def evaluate(maml: mtml.MAML, test: mtml.TaskBatch) -> Tensor:
    """Mean squared errors on new tasks after 0 to STEPS steps, [STEPS + 1]."""
    adapted = maml.adapt_tasks(test.sx, test.sy, steps=STEPS, keep_steps=True)
    return torch.stack([adapted.loss(test, step=k).mean() for k in range(STEPS + 1)])


@torch.no_grad()
def plot(ways: dict[str, mtml.MAML], history: dict[str, list[float]], errors: dict[str, Tensor], out: Path) -> None:
    """Training, the error over steps of adaptation, and a new task as each way fits it."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    line = torch.linspace(-5, 5, 200)[:, None]
    points = torch.linspace(-4.5, 4.5, 10)[:, None]
    sx, sy = points[None], 3 * torch.sin(points - 1)[None]  # [1, 10, 1]
    right.plot(line, 3 * torch.sin(line - 1), "k:", label="the task")
    right.plot(sx[0], sy[0], "k^")
    for name, maml in ways.items():
        smooth = torch.tensor(history[name]).unfold(0, min(50, len(history[name])), 1).mean(1)
        left.plot(smooth, label=name)
        adapted = name != "never adapted"
        middle.plot(errors[name] if adapted else errors[name][:1].expand(STEPS + 1), label=name)
        fit = maml.adapt_tasks(sx, sy, steps=STEPS if adapted else 0)(line[None])[0]
        right.plot(line, fit, label=name)
    left.set(xlabel="meta-step", ylabel="mean squared error", title="training (mean of 50 steps)")
    middle.set(xlabel="steps of adaptation", ylabel="mean squared error", title="new tasks", ylim=(0, None))
    right.set(xlabel="x", ylabel="y", title=f"one of them, after {STEPS} steps")
    right.set(ylim=(-8, 4))
    for ax in (left, middle, right):
        ax.legend(fontsize="small", loc="lower center" if ax is right else "best")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="meta-steps of each way (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("regression.png"))
    args = parser.parse_args()
    ways = learners()
    history = {n: meta_train(m, mtml.tasks.Sinusoids(tasks=25, seed=0), args.steps, n) for n, m in ways.items()}
    test = next(mtml.tasks.Sinusoids(shots=10, queries=100, tasks=500, seed=0, stream=1, block=1))
    errors = {name: evaluate(maml, test) for name, maml in ways.items()}
    base = float(errors["never adapted"][0])
    for name in ("MAML", "shared features"):
        found = errors[name]
        print(f"{name}: MSE {found[1]:.2f} after 1 step, {found[-1]:.2f} after {STEPS} (never adapted {base:.2f})")
    plot(ways, history, errors, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
