"""Gradients averaged over ranks after backward, for loops without DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtml.distributed.group import Group, place, reaching
from mtml.wrappers import is_sharded

__all__ = ["average_gradients"]


def average_gradients(params: Iterable[nn.Parameter], *, group: Group = None) -> None:
    """Replace every ``.grad`` by its mean over the ranks, in one message for each dtype.

    For what DistributedDataParallel does not see: the per-task loop of ``clone()`` and ``adapt()``, balanced or clipped
    gradients that a loop writes itself. Every rank calls it with the same parameters in the same order. A gradient that
    is None counts as zero, and stays None where it is None on all ranks.

    Args:
        params: the meta-parameters; those that require no grad are left out.
        group: of processes; None: all of them.

    Raises:
        TypeError: a parameter is sharded by fully_shard, which averages its gradient itself.
        RankLost: another rank has ended.

    Example:
        >>> import torch, mtml
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer(torch.ones(4, 2)).sum().backward()
        >>> mtml.distributed.average_gradients(layer.parameters())  # of one rank: as it was
        >>> layer.weight.grad
        tensor([[4., 4.]])
    """
    _, ranks = place(group)
    if ranks == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in params:
        if is_sharded(p):
            raise TypeError(
                "params: expected whole parameters, got one that fully_shard has divided and whose gradient it "
                "averages itself; pass the others alone"
            )
        if p.requires_grad:
            kinds.setdefault((p.dtype, p.device), []).append(p)
    for alike in kinds.values():
        _average(alike, ranks, group)


def _average(params: list[nn.Parameter], ranks: int, group: Group) -> None:
    """Of parameters of one dtype on one device."""
    given = torch.tensor([p.grad is not None for p in params])
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([*(g.reshape(-1) for g in parts), given.to(parts[0])])
    flat /= ranks  # before the sum, which then overflows no half precision
    with reaching(ranks):
        dist.all_reduce(flat, group=group)
    *means, known = flat.split([*(p.numel() for p in params), len(params)])
    with torch.no_grad():
        for p, mean in zip(params, means, strict=True):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
        if not given.all():
            _fill(params, means, known)


def _fill(params: list[nn.Parameter], means: list[Tensor], known: Tensor) -> None:
    """Gradients that other ranks have and this one has not."""
    for p, mean, elsewhere in zip(params, means, (known > 0).tolist(), strict=True):
        if p.grad is None and elsewhere:
            p.grad = mean.view_as(p).clone()
