"""A learner's meta-loss as a module's forward, which is what PyTorch's wrappers for several processes wrap."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from mtml.algorithms.anil import ANIL
from mtml.algorithms.base import CallOptions, MetaLearner
from mtml.distributed.shares import tasks_of
from mtml.paths.batch import unpacked
from mtml.paths.features import features_of
from mtml.wrappers import is_sharded
from mtml_kernels.checks import shown

__all__ = ["MetaLoss", "no_losses"]


class MetaLoss(nn.Module):
    """``forward`` is the learner's `meta_loss`, so that DistributedDataParallel and fully_shard have one to wrap.

    They average gradients over ranks: differentiate `mean_over_tasks`, which is exact for shares of any sizes. A share
    without tasks gives losses [0] whose gradients are zero. What is saved is ``learner.state_dict()``, the same on
    every rank and without the wrappers' names.

    Args:
        learner: an `mtml.MAML`, `mtml.ANIL` or other `MetaLearner`.

    Raises:
        TypeError: it is none.

    Example:
        >>> import torch, mtml
        >>> maml = mtml.MAML(torch.nn.Linear(2, 1), lr=0.1, loss="mse")
        >>> meta = mtml.distributed.MetaLoss(maml)  # DistributedDataParallel(meta) where there is a group
        >>> x, y = torch.randn(4, 8, 2), torch.randn(4, 8, 1)
        >>> share = mtml.distributed.shard_tasks(mtml.TaskBatch(x, y, x, y))
        >>> mtml.distributed.mean_over_tasks(meta(share), 4).backward()
        >>> maml.module.weight.grad.shape
        torch.Size([1, 2])

    Papers: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020; Zhao et al.,
    "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023.
    """

    def __init__(self, learner: MetaLearner) -> None:
        super().__init__()
        if not isinstance(learner, MetaLearner):
            raise TypeError(f"learner: expected an mtml.MAML, mtml.ANIL or other MetaLearner, got {shown(learner)}")
        self.learner = learner

    def forward(
        self, sx: Any, sy: Any = None, qx: Any = None, qy: Any = None, **options: Unpack[CallOptions]
    ) -> Tensor:
        """The query loss of every task of this rank's share [t]; arguments as of `MetaLearner.meta_loss`."""
        masks = options.get("support_mask"), options.get("query_mask")
        parts = unpacked(sx, sy, qx, qy, *masks, self.learner)
        if tasks_of(parts[0]):
            return self.learner.meta_loss(sx, sy, qx, qy, **options)
        none = no_losses(self.learner, parts[0], parts[2])
        if not options.get("query_steps"):
            return none
        steps = options.get("steps")
        return none.expand((self.learner.steps if steps is None else steps) + 1, 0)


def no_losses(learner: MetaLearner, sx: Any = None, qx: Any = None) -> Tensor:
    """The losses [0] of a share without tasks: differentiable, with a gradient of zero for every meta-parameter.

    Whoever averages gradients waits for those of all ranks. A trunk that fully_shard has divided also waits for all
    ranks in its forward: it runs on the samples sx, qx [0, N, ...] of no task.
    """
    parts = []
    whole = dict(learner.named_parameters())
    if isinstance(learner, ANIL) and any(map(is_sharded, learner.features.parameters())):
        parts = [features.reshape(-1) for features in features_of(learner.features, sx, qx)]
        whole = {name: p for name, p in whole.items() if not name.startswith("features.")}
    parts += [p.reshape(-1)[:0] for p in whole.values() if p.requires_grad]
    return torch.cat(parts)
