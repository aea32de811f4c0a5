"""Differentiable optimizers of modules."""

from __future__ import annotations

from mtml.compat.torchopt.optim.meta.base import MetaOptimizer
from mtml.compat.torchopt.optim.meta.classes import (
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)

__all__ = [
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
]
