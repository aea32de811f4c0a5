"""Models wrapped for several processes: what an inner loop cannot see through, and the way out."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["is_sharded", "refuse_data_parallel", "refuse_sharded"]


def is_sharded(tensor: Any) -> bool:
    """Whether this is one rank's part of a tensor, as fully_shard leaves it between two calls."""
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it, which takes a while
    return module is not None and isinstance(tensor, module.DTensor)


WRAP_LEARNER = "wrap the learner: DistributedDataParallel(mtml.distributed.MetaLoss(learner))"


def refuse_data_parallel(name: str, model: nn.Module, instead: str = WRAP_LEARNER) -> None:
    """Raise TypeError where DistributedDataParallel is in a model whose parameters an inner loop takes.

    It averages what a backward through its own forward leaves. Inner loops run forward many times on parameters of
    their own, or not at all: ranks would drift apart without a word. `instead`: what averages them.
    """
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            where = f" at {path!r}" if path else ""
            raise TypeError(
                f"{name}: expected a model that is not wrapped, got DistributedDataParallel{where}, which would not "
                f"average meta-gradients; pass the model within (its .module) and {instead}"
            )


def refuse_sharded(name: str, model: nn.Module) -> None:
    """Raise TypeError where parameters that an inner loop reads are divided among ranks."""
    for path, p in model.named_parameters():
        if is_sharded(p):
            raise TypeError(
                f"{name}: expected whole parameters, got {path!r} as fully_shard divides it; call "
                "fully_shard(mtml.distributed.MetaLoss(learner)) and that module, which gathers them for a meta-step. "
                "Of parts alone it may shard ANIL's trunk"
            )
