"""Omniglot from its files; the other data sets of the original, which it downloads, raise and name the way out."""

from typing import Any

from mtml.compat.torchmeta.datasets import helpers, helpers_tabular
from mtml.compat.torchmeta.datasets.absent import IMAGES, TABLES, absent
from mtml.compat.torchmeta.datasets.omniglot import Omniglot

__all__ = [
    "CIFARFS",  # by __getattr__
    "CUB",
    "FC100",
    "TCGA",
    "Bach",
    "DoubleMNIST",
    "Letter",
    "MiniImagenet",
    "Omniglot",
    "Pascal5i",
    "PlantsMargin",
    "PlantsShape",
    "PlantsTexture",
    "TieredImagenet",
    "TripleMNIST",
    "helpers",
    "helpers_tabular",
]


def __getattr__(name: str) -> Any:
    if name in {*IMAGES.values(), *TABLES.values()}:
        return absent(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
