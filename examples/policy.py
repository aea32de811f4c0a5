"""Meta-reinforcement learning: a policy that finds an unknown goal after one step of policy gradient.

    python examples/policy.py [--steps 150] [--out policy.png]

A point in the plane starts at 0 and goes 10 steps of at most 0.2; its reward is minus its distance to a goal on the
unit circle, which it never sees. A task is a goal. The inner loop is REINFORCE on 20 episodes of the policy, the
outer one on episodes of the adapted policies, through the inner step (Finn et al. 2017, arXiv 1703.03400). The baseline
is the same policy before it adapts: it cannot know where to go. Expect the last distance to fall from 1 to a quarter.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtml

HORIZON, EPISODES, STRIDE, NOISE = 10, 20, 0.2, 0.3


def policy_loss(mean: Tensor, target: Tensor) -> Tensor:
    """REINFORCE: minus the log-probability of the actions times their advantages; target [N, 3] holds both."""
    action, advantage = target[..., :2], target[..., 2:]
    return (advantage * (action - mean).square()).sum(-1).mean() / (2 * NOISE**2)


def goals(count: int, generator: torch.Generator) -> Tensor:
    """Places on the unit circle, [T, 1, 2]."""
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], -1)


@torch.no_grad()
def episodes(policy: Callable[[Tensor], Tensor], goal: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Places [T, N, 2], targets of `policy_loss` [T, N, 3], paths [T, EPISODES, HORIZON + 1, 2]; N all their steps."""
    place = goal.new_zeros(len(goal), EPISODES, 2)
    paths, actions, rewards = [place], [], []
    for _ in range(HORIZON):
        mean = policy(place)
        action = mean + NOISE * torch.randn(mean.shape, generator=generator)
        place = place + STRIDE * action / action.norm(dim=-1, keepdim=True).clamp(min=1)
        paths.append(place)
        actions.append(action)
        rewards.append(-(place - goal).norm(dim=-1))
    to_come = torch.stack(rewards, 2).flip(2).cumsum(2).flip(2)  # [T, EPISODES, HORIZON]
    advantage = (to_come - to_come.mean(1, keepdim=True)) / to_come.std((1, 2), keepdim=True)
    path = torch.stack(paths, 2)
    target = torch.cat([torch.stack(actions, 2), advantage[..., None]], -1)
    return path[:, :, :-1].flatten(1, 2), target.flatten(1, 2), path


def at_the_end(path: Tensor, goal: Tensor) -> float:
    """The mean distance to the goal after the last step."""
    return float((path[:, :, -1] - goal).norm(dim=-1).mean())


def train(maml: mtml.MAML, steps: int, generator: torch.Generator) -> list[tuple[float, float]]:
    """Distances before and after adaptation, at every meta-step."""
    optimizer = torch.optim.Adam(maml.parameters(), 3e-3)
    history = []
    for _ in (bar := tqdm(range(steps), unit="step")):
        goal = goals(40, generator)
        sx, sy, before = episodes(maml, goal, generator)
        with torch.no_grad():
            adapted = maml.adapt_tasks(sx, sy)
        qx, qy, after = episodes(adapted, goal, generator)
        loss = maml.meta_loss(sx, sy, qx, qy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((at_the_end(before, goal), at_the_end(after, goal)))
        bar.set_postfix(distance=f"{history[-1][1]:.2f}", refresh=False)
    return history


def plot(history: list[tuple[float, float]], goal: Tensor, paths: dict[str, Tensor], out: Path) -> None:
    """Distances over the meta-steps, and episodes of six new tasks before and after."""
    import matplotlib.pyplot as plt

    figure, (left, *planes) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    left.plot(history, label=list(paths))
    left.set(xlabel="meta-step", ylabel="distance to the goal at the end", ylim=(0, None))
    left.legend()
    for ax, (name, path) in zip(planes, paths.items(), strict=True):
        for t in range(6):
            ax.plot(*path[t, :5].permute(2, 1, 0), f"C{t}", lw=1)
            ax.plot(*goal[t, 0], f"C{t}*", ms=14)
        ax.set(title=name, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="meta-steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("policy.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    policy = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    maml = mtml.MAML(policy, lr=0.1, steps=1, loss=policy_loss, backend="general")
    history = train(maml, args.steps, generator)
    goal = goals(200, generator)
    sx, sy, before = episodes(maml, goal, generator)
    with torch.no_grad():
        adapted = maml.adapt_tasks(sx, sy)
    after = episodes(adapted, goal, generator)[2]
    print(f"new goals: distance {at_the_end(after, goal):.2f} (before adapting {at_the_end(before, goal):.2f})")
    plot(history, goal, {"before": before, "after one step": after}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
