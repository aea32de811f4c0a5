"""Optimizers as objects."""

from __future__ import annotations

from mtml.compat.torchopt.optim import meta
from mtml.compat.torchopt.optim.base import Optimizer
from mtml.compat.torchopt.optim.classes import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    RAdam,
    RMSProp,
    RMSprop,
)
from mtml.compat.torchopt.optim.func import FuncOptimizer

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "meta",
]
