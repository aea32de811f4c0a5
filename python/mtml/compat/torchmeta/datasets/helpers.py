"""Image data sets with their tasks split into train and test."""

from __future__ import annotations

import warnings
from typing import Any

from mtml.compat.torchmeta.datasets.absent import absent
from mtml.compat.torchmeta.datasets.omniglot import Omniglot
from mtml.compat.torchmeta.transforms.augmentations import Rotation
from mtml.compat.torchmeta.transforms.categorical import Categorical
from mtml.compat.torchmeta.transforms.splitters import ClassSplitter

__all__ = [
    "cifar_fs",
    "cub",
    "doublemnist",
    "fc100",
    "miniimagenet",
    "omniglot",
    "pascal5i",
    "tieredimagenet",
    "triplemnist",
]

miniimagenet, tieredimagenet = absent("miniimagenet"), absent("tieredimagenet")
cifar_fs, fc100, cub = absent("cifar_fs"), absent("fc100"), absent("cub")
doublemnist, triplemnist, pascal5i = absent("doublemnist"), absent("triplemnist"), absent("pascal5i")


def omniglot(
    folder: str,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """`Omniglot` whose tasks are {"train": ways * `shots` samples, "test": ways * `test_shots` (as many by default)}.

    Class ids 0..ways-1; every character also turned by 90, 180 and 270 degrees, each angle a class of its own.

    Args:
        shuffle: draw which samples are which.
        seed: of the data set.
        kwargs: of `Omniglot`.

    Raises:
        DataError: as `Omniglot`.
    """
    if "num_classes_per_task" in kwargs:
        warnings.warn("ways: not used, since num_classes_per_task is given", stacklevel=2)
        ways = kwargs.pop("num_classes_per_task")
    kwargs.setdefault("target_transform", Categorical(ways))
    kwargs.setdefault("class_augmentations", [Rotation([90, 180, 270])])
    dataset = Omniglot(folder, num_classes_per_task=ways, **kwargs)
    test_shots = shots if test_shots is None else test_shots
    dataset = ClassSplitter(dataset, shuffle=shuffle, num_train_per_class=shots, num_test_per_class=test_shots)
    dataset.seed(seed)
    return dataset
