"""Groups of tasks of every kind, and multi-task MAML in plain PyTorch, one task after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mtml
from mtml.multihead.heads import Head
from mtml.multitask.features import GroupModel

WIDTH = 6
Reduced = Callable[[Tensor, Tensor, Tensor], Tensor]


class Recurrent(nn.Module):
    """Token ids [N, L] -> features [N, L, D] of an embedding and a GRU or RNN."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.cells = kind(5, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.cells(self.embedding(ids))[0]
        return found


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WIDTH), nn.Tanh())


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), nn.Tanh())


HEADS: dict[str, Head] = {
    "class": mtml.Classification(3),
    "value": mtml.Regression(2),
    "label": mtml.MultiLabel(4),
    "pixel": mtml.Segmentation(3),
    "token": mtml.Tokens(7, ignore_index=0),
}


def trunks() -> dict[str, nn.Module]:
    """One for all vectors, one for images, one for text."""
    shared = dense()
    return {"class": shared, "value": shared, "label": shared, "pixel": conv(), "token": Recurrent()}


def batches(masks: bool = False) -> dict[str, mtml.TaskBatch]:
    """Of unequal sizes: 3 to 1 tasks of 2 to 6 samples."""
    found = {
        "class": _batch(3, 5, 4, (4,), lambda *n: torch.randint(3, n)),
        "value": _batch(2, 6, 3, (4,), lambda *n: torch.randn(*n, 2)),
        "label": _batch(1, 4, 5, (4,), lambda *n: torch.rand(*n, 4)),
        "pixel": _batch(2, 2, 3, (1, 4, 3), lambda *n: torch.randint(3, (*n, 4, 3))),
        "token": _batch(2, 3, 2, (5,), lambda *n: torch.randint(7, (*n, 5)), ids=True),
    }
    if masks:
        found = {name: _masked(batch) for name, batch in found.items()}
    return found


def _batch(
    tasks: int, support: int, query: int, shape: tuple[int, ...], target: Callable[..., Tensor], ids: bool = False
) -> mtml.TaskBatch:
    sets = []
    for count in (support, query):
        x = torch.randint(7, (tasks, count, *shape)) if ids else torch.randn(tasks, count, *shape)
        sets += [x, target(tasks, count)]
    return mtml.TaskBatch(*sets)


def _masked(batch: mtml.TaskBatch) -> mtml.TaskBatch:
    return batch._replace(support_mask=torch.rand(batch.sy.shape[:2]), query_mask=torch.rand(batch.qy.shape[:2]))


def _weighted(each: Tensor, weights: Tensor, counts: Tensor | None = None) -> Tensor:
    weights = weights.reshape(*weights.shape, *(1,) * (each.ndim - weights.ndim)).expand_as(each)
    return (weights * each).sum() / (weights if counts is None else weights * counts).sum()


REDUCED: dict[str, Reduced] = {
    "class": lambda z, y, w: _weighted(F.cross_entropy(z, y, reduction="none"), w),
    "value": lambda z, y, w: _weighted((z - y).square(), w),
    "label": lambda z, y, w: _weighted(F.binary_cross_entropy_with_logits(z, y, reduction="none"), w),
    "pixel": lambda z, y, w: _weighted(F.cross_entropy(z, y, reduction="none"), w),
    "token": lambda z, y, w: _weighted(
        F.cross_entropy(z.transpose(1, 2), y, reduction="none", ignore_index=0), w, (y != 0).to(z)
    ),
}


def plain_losses(
    model: nn.Module,
    names: list[str],
    batch: mtml.TaskBatch,
    loss: Reduced,
    lr: Any,
    steps: int,
    first_order: bool = False,
) -> Tensor:
    """The query losses [T] of one group, by autograd."""
    own = dict(model.named_parameters())
    losses = []
    for t in range(batch.tasks):
        sw, qw = (
            torch.ones(y.shape[1], dtype=torch.get_default_dtype()) if mask is None else mask[t]
            for y, mask in ((batch.sy, batch.support_mask), (batch.qy, batch.query_mask))
        )
        fast: dict[str, Tensor] = {name: own[name] for name in names}
        for _ in range(steps):
            inner = loss(functional_call(model, fast, (batch.sx[t],)), batch.sy[t], sw)
            grads = torch.autograd.grad(inner, list(fast.values()), create_graph=not first_order)
            fast = {n: p - lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(loss(functional_call(model, fast, (batch.qx[t],)), batch.qy[t], qw))
    return torch.stack(losses)


def plain(
    model: mtml.MultiTaskMAML,
    data: Mapping[str, mtml.TaskBatch],
    *,
    lr: Any,
    steps: int,
    adapted: str = "head.",
    first_order: bool = False,
) -> dict[str, Tensor]:
    """{group: [T]} on the parameters of `model`."""
    found = {}
    for name, batch in data.items():
        trunk = model.trunk[name] if isinstance(model.trunk, nn.ModuleDict) else model.trunk
        whole = GroupModel(trunk, model.heads[name])
        names = [n for n, _ in whole.named_parameters() if n.startswith(adapted)]
        found[name] = plain_losses(whole, names, batch, REDUCED[name], lr, steps, first_order)
    return found
