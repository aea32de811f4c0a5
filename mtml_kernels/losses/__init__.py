"""Losses: their specifications, which of them a user's loss is, and what they mean for one task."""

from mtml_kernels.losses.recognise import Loss, Opaque, resolve, unfused_target
from mtml_kernels.losses.task import TaskLoss, per_sample, refuse_several, takes, task_loss
from mtml_kernels.schema.losses import (
    CLASS_KINDS,
    GRAM_KINDS,
    HEAD_KINDS,
    IGNORED,
    KINDS,
    LOSSES,
    REDUCTIONS,
    HeadLoss,
    LossInfo,
    LossSpec,
)

__all__ = [
    "CLASS_KINDS",
    "GRAM_KINDS",
    "HEAD_KINDS",
    "IGNORED",
    "KINDS",
    "LOSSES",
    "REDUCTIONS",
    "HeadLoss",
    "Loss",
    "LossInfo",
    "LossSpec",
    "Opaque",
    "TaskLoss",
    "per_sample",
    "refuse_several",
    "resolve",
    "takes",
    "task_loss",
    "unfused_target",
]
