"""What a module does besides computing: batch normalisation modes, and buffers that its forward writes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mtml_kernels.checks import check_choice
from mtml_kernels.general.twin import relink, twin

__all__ = [
    "BATCH_NORM_MODES",
    "batch_norm_mode",
    "check_batch_norm",
    "fresh_buffers",
    "notice_recomputing",
    "relink",
    "set_batch_norm",
    "tracks",
    "twin",
    "written_buffers",
]

BATCH_NORM_MODES = ("module", "track", "batch", "running", "per_step")


def check_batch_norm(model: nn.Module, mode: str) -> None:
    """Raise ValueError for an unknown mode, or one that the model's layers cannot follow."""
    check_choice("batch_norm", mode, BATCH_NORM_MODES)
    for name, module in model.named_modules():
        if mode == "per_step" and isinstance(module, _BatchNorm):
            raise ValueError(
                f"batch_norm: expected PerStepBatchNorm layers for 'per_step', but layer {name!r} is a "
                f"{type(module).__name__}; mtml.MAML(..., batch_norm='per_step') replaces nn.BatchNorm1d, 2d and 3d"
            )
        if mode == "running" and isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"batch_norm: expected running statistics for 'running', but layer {name!r} keeps none; "
                "use 'batch', or build the layer with track_running_stats=True"
            )


def tracks(model: nn.Module) -> bool:
    """Does a batch normalisation layer of the model update running statistics as it stands?"""
    return any(
        isinstance(m, _BatchNorm) and m.training and m.track_running_stats and m.running_mean is not None
        for m in model.modules()
    )


def set_batch_norm(model: nn.Module, mode: str) -> None:
    """From now on, batch normalisation layers normalise as `mode` says and, unless that is "track", update nothing."""
    for layer in [] if mode == "track" else [m for m in model.modules() if isinstance(m, _BatchNorm)]:
        if mode == "running":
            layer.training = False
        elif mode in ("batch", "per_step") or layer.training:
            # a training layer that tracks nothing uses the batch and is handed no buffers, so none can change
            layer.training, layer.track_running_stats = True, False


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Within it, the layers are as `set_batch_norm` makes them."""
    saved = [(m, m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        set_batch_norm(model, mode)
        yield
    finally:
        for layer, training, track in saved:
            layer.training, layer.track_running_stats = training, track


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


def fresh_buffers(model: nn.Module, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Copies of the named buffers (all of them for None) for a forward to write to in place of the module's own."""
    found = dict(model.named_buffers())
    return {name: found[name].detach().clone() for name in (found if names is None else names)}


def written_buffers(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the buffers that changed between two snapshots."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)

    return tuple(name for name in before if not same(before[name], after[name]))
