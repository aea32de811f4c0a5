"""learn2learn.optim: transforms of gradients that are learned, and what applies them."""

from __future__ import annotations

from mtml.compat.learn2learn.optim import transforms, update_rules
from mtml.compat.learn2learn.optim.learnable_optimizer import LearnableOptimizer
from mtml.compat.learn2learn.optim.parameter_update import ParameterUpdate
from mtml.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from mtml.compat.learn2learn.optim.update_rules import DifferentiableSGD

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
    "transforms",
    "update_rules",
]
