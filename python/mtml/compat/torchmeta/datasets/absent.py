"""Data sets that the original downloads and converts, and that are not here."""

from __future__ import annotations

from mtml.compat.absent import Absent

__all__ = ["IMAGES", "TABLES", "absent"]

# {its function in helpers: its class}
IMAGES = {
    "miniimagenet": "MiniImagenet",
    "tieredimagenet": "TieredImagenet",
    "cifar_fs": "CIFARFS",
    "fc100": "FC100",
    "cub": "CUB",
    "doublemnist": "DoubleMNIST",
    "triplemnist": "TripleMNIST",
    "pascal5i": "Pascal5i",
    "tcga": "TCGA",
}
TABLES = {
    "letter": "Letter",
    "plants_texture": "PlantsTexture",
    "plants_shape": "PlantsShape",
    "plants_margin": "PlantsMargin",
    "bach": "Bach",
}


def absent(name: str) -> Absent:
    """What stands in the place of this data set."""
    return Absent(
        name,
        "Derive your own from torchmeta.utils.data.ClassDataset (an item is the data set of a class) over the files "
        "you have and give it to CombinationMetaDataset; or give arrays to mtml.tasks.EpisodeDataset, whose batches "
        "meta_loss takes too",
    )
