"""Small families of tasks that an algorithm learns in a second, and the training that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtml.tasks import TaskBatch

Draw = Callable[[torch.Generator], TaskBatch]


def curves(generator: torch.Generator, tasks: int = 8, shots: int = 6, queries: int = 12) -> TaskBatch:
    """y = (1 + a / 2) sin(2 x) + b / 2: what the tasks share has to be learned, a and b have to be adapted to."""

    def some(n: int) -> tuple[Tensor, Tensor]:
        x = 4 * torch.rand(tasks, n, 1, generator=generator) - 2
        return x, (1 + a / 2) * torch.sin(2 * x) + b / 2

    a, b = (torch.rand(tasks, 1, 1, generator=generator) * 2 - 1 for _ in range(2))
    return TaskBatch(*some(shots), *some(queries))


def clusters(generator: torch.Generator, tasks: int = 8, ways: int = 3, shots: int = 2, queries: int = 6) -> TaskBatch:
    """Classes are angles in one plane of 6 dimensions, anew for every task; the other dimensions are noise."""

    def some(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat(n).expand(tasks, -1)
        angle = angles.gather(1, y) + 0.1 * torch.randn(tasks, ways * n, generator=generator)
        noise = 2 * torch.randn(tasks, ways * n, 4, generator=generator)
        return torch.cat((angle.cos()[..., None], angle.sin()[..., None], noise), -1), y

    turn = torch.rand(tasks, 1, generator=generator) * 6.28
    angles = turn + torch.arange(ways) * 6.28 / ways
    return TaskBatch(*some(shots), *some(queries))


def perceptron(inputs: int, outputs: int, width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )


def endless(draw: Draw, seed: int = 1) -> Iterator[TaskBatch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(generator)


def judged(learner: Any, draw: Draw) -> float:
    """The adapted models' query loss on 64 unseen tasks."""
    batch = draw(torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float(learner.adapt_tasks(batch.sx, batch.sy).loss(batch.qx, batch.qy).mean())


def trained(learner: Any, draw: Draw, iterations: int, lr: float = 5e-3, optimizer: Any = None) -> tuple[float, float]:
    """The adapted models' query loss before and after meta-training."""
    before = judged(learner, draw)
    optimizer = torch.optim.Adam(learner.parameters(), lr) if optimizer is None else optimizer
    for batch, _ in zip(endless(draw), range(iterations), strict=False):
        loss = learner.meta_loss(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, judged(learner, draw)
