"""Data sets that the original downloads and converts, and that are not here."""

from __future__ import annotations

from typing import Any, NoReturn

from mtml.tasks import DataError

__all__ = ["IMAGES", "TABLES", "Absent"]

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


class Absent:
    """Takes the place of a data set: importing it is no error, using it is.

    Raises:
        DataError: when it is called.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DataError(
            f"{self.__name__}: not in mtml.compat.torchmeta, which downloads nothing. Derive your own from "
            "utils.data.ClassDataset (an item is the data set of a class) over the files you have and give it to "
            "utils.data.CombinationMetaDataset; or give arrays to mtml.tasks.EpisodeDataset, whose batches meta_loss "
            "takes too"
        )

    def __repr__(self) -> str:
        return f"<{self.__name__}, which is absent>"
