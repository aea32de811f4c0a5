"""What a module does besides computing: activation checkpointing, random numbers, buffers that forward writes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["fresh_buffers", "notice_recomputing", "same_random_numbers", "written_buffers"]


class _NoticeRecomputing(TorchFunctionMode):
    """Within it, `found` turns true when something runs under hooks on saved tensors that were not there before.

    That is how activation checkpointing (not the reentrant kind, which autograd.grad refuses by itself) shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.top = torch._C._autograd._top_saved_tensors_default_hooks
        self.outside, self.found = self.top(False), False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.top(False) != self.outside:
            self.found = True
        return func(*args, **(kwargs or {}))


def notice_recomputing() -> _NoticeRecomputing:
    """A context that notices activation checkpointing in what this thread runs."""
    return _NoticeRecomputing()


@contextmanager
def same_random_numbers(data: Any) -> Iterator[None]:
    """Whatever is drawn within is drawn again after it."""
    devices = {t.device for t in pytree.tree_leaves(data) if isinstance(t, Tensor) and t.device.type != "cpu"}
    kinds = {device.type for device in devices}
    with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kinds.pop() if kinds else "cuda"):
        yield


def fresh_buffers(model: nn.Module, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Copies of the named buffers (all of them for None) for a forward to write to in place of the module's own."""
    found = dict(model.named_buffers())
    return {name: found[name].detach().clone() for name in (found if names is None else names)}


def written_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the buffers that changed between two snapshots."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)

    return tuple(name for name in before if not same(before[name], after[name]))
