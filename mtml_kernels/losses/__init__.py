"""Losses: their specifications, which of them a user's loss is, and what they mean for one task."""

from mtml_kernels.losses.callables import Recognised, in_words, recognise
from mtml_kernels.losses.matching import Sizes
from mtml_kernels.losses.purity import live_because
from mtml_kernels.losses.recognise import Loss, Opaque, loss_name, resolve, unfused_target
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
    "Recognised",
    "Sizes",
    "TaskLoss",
    "in_words",
    "live_because",
    "loss_name",
    "per_sample",
    "recognise",
    "refuse_several",
    "resolve",
    "takes",
    "task_loss",
    "unfused_target",
]
