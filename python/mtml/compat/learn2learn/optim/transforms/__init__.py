"""learn2learn.optim.transforms: what makes a module for a parameter, gradient -> update."""

from __future__ import annotations

from mtml.compat.learn2learn.optim.transforms.kronecker_transform import KroneckerTransform
from mtml.compat.learn2learn.optim.transforms.metacurvature_transform import MetaCurvatureTransform
from mtml.compat.learn2learn.optim.transforms.module_transform import ModuleTransform, ReshapedTransform
from mtml.compat.learn2learn.optim.transforms.transform_dictionary import TransformDictionary

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]
