"""Omniglot from its files; the other data sets of the original, which it downloads, raise and name the way out."""

from typing import Any

from mtml.compat.absent import Absent
from mtml.compat.learn2learn.vision.datasets.full_omniglot import FullOmniglot

__all__ = ["ABSENT", "WAY_OUT", "FullOmniglot"]

ABSENT = (
    "CIFARFS",
    "CUBirds200",
    "DescribableTextures",
    "FC100",
    "FGVCAircraft",
    "FGVCFungi",
    "MiniImagenet",
    "Quickdraw",
    "TieredImagenet",
    "VGGFlower102",
)
WAY_OUT = (
    "Make a torch Dataset of (image, label) of the files you have and give it to learn2learn.data.MetaDataset and "
    "Taskset; or give arrays to mtml.tasks.EpisodeDataset, whose batches meta_loss takes too"
)


def __getattr__(name: str) -> Any:
    if name in ABSENT:
        return Absent(name, WAY_OUT)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
