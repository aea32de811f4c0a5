"""Meta-training on several processes: every rank takes its share of a meta-batch's tasks, gradients are averaged.

    batch = next(tasks)                                   # the same meta-batch on every rank
    losses = meta(shard_tasks(batch))                     # meta = DistributedDataParallel(MetaLoss(maml))
    mean_over_tasks(losses, batch.tasks).backward()       # exact, whatever number of tasks each rank has

Ranks are processes of a ``torch.distributed`` group: ``torchrun --nproc_per_node 2 train.py``, which starts with
``torch.distributed.init_process_group``. Without a group there is one rank, and all of this is what one process does.
"""

from mtml.distributed.gradients import average_gradients
from mtml.distributed.group import RankLost
from mtml.distributed.meta_loss import MetaLoss, no_losses
from mtml.distributed.shares import mean_over_tasks, shard_tasks, share_of

__all__ = ["MetaLoss", "RankLost", "average_gradients", "mean_over_tasks", "no_losses", "shard_tasks", "share_of"]
