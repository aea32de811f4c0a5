"""Meta-gradients of one rank and of several, for learners and batches of every kind; run on each of the ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mtml
from mtml.distributed import MetaLoss, RankLost, average_gradients, mean_over_tasks, shard_tasks

Learner = mtml.MAML | mtml.ANIL


class OwnForward(nn.Module):
    """A user's module: its forward calls meta_loss."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.maml = learner

    def forward(self, batch: mtml.TaskBatch, weight: float) -> Tensor:
        return weight * self.maml.meta_loss(batch)


def mlp(out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, out))


def convolutions() -> nn.Sequential:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def with_rates() -> mtml.MAML:
    model = mlp()
    return mtml.MAML(model, mtml.InnerLR(model, 0.1, per="tensor", steps=2), steps=2)


def anil() -> mtml.ANIL:
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    return mtml.ANIL(trunk, nn.Linear(5, 3), 0.3, steps=4)


def entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target) + 0.1 * output.softmax(-1).square().mean()


LEARNERS: dict[str, Callable[[], Learner]] = {
    "mlp": lambda: mtml.MAML(mlp(), 0.3, steps=3),
    "conv": lambda: mtml.MAML(convolutions(), 0.1, steps=2),
    "rates": with_rates,
    "meta-sgd": lambda: mtml.MetaSGD(mlp(), 0.1, steps=2),
    "general": lambda: mtml.MAML(mlp(), 0.3, steps=2, loss=entropy, backend="general"),
    "adam": lambda: mtml.MAML(mlp(), 0.1, steps=2, update=mtml.inner.Adam()),
    "anil": anil,
}


def batch_of(tasks: int, name: str, dtype: torch.dtype = torch.float64, masks: bool = False) -> mtml.TaskBatch:
    """The same on every rank; tasks differ in how large their gradients are."""
    generator = torch.Generator().manual_seed(tasks)
    shape = (1, 6, 6) if name == "conv" else (6,)
    x = torch.randn(tasks, 8, *shape, generator=generator, dtype=dtype)
    x *= torch.arange(1.0, tasks + 1).view(-1, *[1] * (x.ndim - 1)).to(dtype)
    y = torch.randint(3, (tasks, 8), generator=generator)
    weights = (torch.rand(tasks, 4, generator=generator, dtype=dtype) if masks else None,) * 2
    return mtml.TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:], *weights)


def made(name: str, dtype: torch.dtype) -> Learner:
    torch.manual_seed(0)
    return LEARNERS[name]().to(dtype)


def gradients(learner: nn.Module) -> dict[str, Tensor]:
    """By name, whole where ranks hold parts."""
    found = {}
    for name, p in learner.named_parameters():
        assert p.grad is not None, name
        found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


@dataclass
class Both:
    """Gradients of the whole batch in one process, and of shares on all ranks; and this rank's number of tasks."""

    one: dict[str, Tensor]
    all: dict[str, Tensor]
    tasks: int


def of_one(name: str, batch: mtml.TaskBatch, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    learner = made(name, dtype)
    learner.meta_loss(batch, **options).mean().backward()
    return gradients(learner)


def both(
    name: str,
    tasks: int,
    dtype: torch.dtype = torch.float64,
    *,
    masks: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    loss: Callable[[Tensor, int], Tensor] = mean_over_tasks,
    **options: Any,
) -> Both:
    batch, learner = batch_of(tasks, name, dtype, masks), made(name, dtype)
    meta, share = wrap(MetaLoss(learner)), shard_tasks(batch)
    for _ in range(2):  # the second finds what the first prepared
        learner.zero_grad()
        loss(meta(share, **options), batch.tasks).backward()
    return Both(of_one(name, batch, dtype), gradients(learner), share.tasks)


def in_parts(meta: nn.Module) -> nn.Module:
    """fully_shard as its documentation has it: blocks of the trunk, then the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert isinstance(meta, MetaLoss)
    if isinstance(meta.learner, mtml.ANIL):
        fully_shard(meta.learner.features, mesh=mesh)
    fully_shard(meta, mesh=mesh)
    divided = [type(p).__name__ for p in meta.parameters()]
    assert divided == ["DTensor"] * len(divided)
    return meta


def sharded_trunk(tasks: int) -> Both:
    """fully_shard around ANIL's trunk alone; the head's gradients are averaged after backward."""
    batch, learner = batch_of(tasks, "anil"), made("anil", torch.float64)
    assert isinstance(learner, mtml.ANIL)
    fully_shard(learner.features, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    share = shard_tasks(batch)
    mean_over_tasks(MetaLoss(learner)(share), tasks).backward()
    average_gradients(learner.head.parameters())
    return Both(of_one("anil", batch, torch.float64), gradients(learner), share.tasks)


def by_hand(tasks: int) -> Both:
    """The per-task loop of clone() and adapt(); a rank without tasks, and a parameter that only some tasks use."""
    batch, learner = batch_of(tasks, "mlp"), made("mlp", torch.float64)

    def loss(each: mtml.TaskBatch) -> Tensor:
        losses = []
        for sx, sy, qx, qy, *_ in zip(*each[:4], strict=True):
            learned = learner.clone()
            for _ in range(3):
                learned.adapt(nn.functional.cross_entropy(learned(sx), sy))
            losses.append(nn.functional.cross_entropy(learned(qx), qy))
        return torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64, requires_grad=True)

    share = shard_tasks(batch)
    mean_over_tasks(loss(share)).backward()
    average_gradients(learner.parameters())
    return Both(of_one("mlp", batch, torch.float64), gradients(learner), share.tasks)


def own_forward() -> Both:
    """A module of the user's own in DistributedDataParallel."""
    batch, learner = batch_of(4, "mlp"), made("mlp", torch.float64)
    meta = DistributedDataParallel(OwnForward(learner))
    losses = meta(shard_tasks(batch), 1.0)
    losses.mean().backward()  # shares of one size
    return Both(of_one("mlp", batch, torch.float64), gradients(learner), len(losses))


def absent() -> list[bool]:
    """Which gradients are there where this rank had none, one rank had one, and no rank had any."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[0].grad = torch.ones(2)
    if dist.get_rank() == 0:
        params[1].grad = torch.full((2,), 4.0)
    average_gradients(params)
    assert params[0].grad.tolist() == [1.0, 1.0] and params[1].grad.tolist() == [2.0, 2.0]
    return [p.grad is not None for p in params]


def refused() -> dict[str, str]:
    """What is said where a wrapper is in the wrong place."""
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    x, y = torch.randn(2, 4, 6), torch.randint(3, (2, 4))
    sharded, trunk, head = (fully_shard(m, mesh=mesh) for m in (mlp(), mlp(5), nn.Linear(5, 3)))
    later = anil()
    fully_shard(later.head, mesh=mesh)
    wrong: dict[str, Callable[[], Any]] = {
        "DDP in MAML": lambda: mtml.MAML(DistributedDataParallel(mlp()), 0.1),
        "DDP within": lambda: mtml.MAML(nn.Sequential(DistributedDataParallel(mlp()), nn.Tanh()), 0.1),
        "DDP in ANIL": lambda: mtml.ANIL(DistributedDataParallel(mlp(5)), nn.Linear(5, 3), 0.1),
        "sharded MAML": lambda: mtml.MAML(sharded, 0.1).meta_loss(x, y, x, y),
        "sharded head": lambda: mtml.ANIL(mlp(5), head, 0.1),
        "later sharded head": lambda: later.meta_loss(x, y, x, y),
        "average": lambda: average_gradients(trunk.parameters()),
    }
    for name, call in wrong.items():
        try:
            call()
        except TypeError as error:
            said[name] = str(error)
    return said


def lost() -> tuple[str, float]:
    """The last rank ends without a word; what the others hear, and after how many seconds."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    layer, start = nn.Linear(2, 1), time.monotonic()
    layer(torch.ones(1, 2)).sum().backward()
    try:
        average_gradients(layer.parameters())
    except RankLost as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


def session(folder: Path) -> dict[str, Any]:
    """Everything of a group of ranks, in one start of the processes."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {f"{name} {tasks}": both(name, tasks) for name in LEARNERS for tasks in (4, 5)}
    found |= {f"float32 {name}": both(name, 5, torch.float32) for name in LEARNERS}
    found |= {f"empty {name}": both(name, 1) for name in ("mlp", "rates", "anil")}
    found |= {f"sharded {name}": both(name, 5, wrap=in_parts) for name in ("mlp", "anil")}
    found["sharded empty anil"] = both("anil", 1, wrap=in_parts)
    found |= {f"sharded trunk {tasks}": sharded_trunk(tasks) for tasks in (5, 1)}
    found["masks"] = both("mlp", 5, masks=True)
    found["by hand"], found["by hand, empty"] = by_hand(5), by_hand(1)
    found["own forward"] = own_forward()
    found["means of means"] = both("mlp", 5, loss=lambda losses, _: losses.mean())
    found["first order"] = both("mlp", 5, first_order=True)
    found["nobody averages"] = both("mlp", 4, wrap=lambda meta: meta)
    found |= {"absent": absent(), "refused": refused(), "lost": lost()}
    return found
