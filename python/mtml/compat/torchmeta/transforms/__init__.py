"""Transforms of targets, of classes and of whole tasks."""

from mtml.compat.torchmeta.transforms.augmentations import HorizontalFlip, Rotation, VerticalFlip
from mtml.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from mtml.compat.torchmeta.transforms.splitters import ClassSplitter, Splitter, WeightedClassSplitter
from mtml.compat.torchmeta.transforms.tabular_transforms import NumpyToTorch
from mtml.compat.torchmeta.transforms.target_transforms import (
    DefaultTargetTransform,
    SegmentationPairTransform,
    TargetTransform,
)

__all__ = [
    "Categorical",
    "ClassSplitter",
    "DefaultTargetTransform",
    "FixedCategory",
    "HorizontalFlip",
    "NumpyToTorch",
    "Rotation",
    "SegmentationPairTransform",
    "Splitter",
    "TargetTransform",
    "VerticalFlip",
    "WeightedClassSplitter",
]
