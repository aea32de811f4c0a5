"""The images that `mtml train omniglot` trains, watches and tests on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtml.tasks.digits import load_digits
from mtml.tasks.errors import DataError
from mtml.tasks.omniglot import SPLITS, split_omniglot

__all__ = ["Images", "load_images"]


class Images(NamedTuple):
    """uint8 [classes, drawings, pixels]: to train on, to look at while training, to test on; names of the last."""

    train: np.ndarray
    watched: np.ndarray
    test: np.ndarray
    names: tuple[str, ...]

    @property
    def side(self) -> int:
        """Pixels along an edge of the square images."""
        return math.isqrt(self.train.shape[2])


def load_images(data: Path | None, split: str, validation: int) -> Images:
    """Omniglot below `data`; without it scikit-learn's digits, new drawings of which stand in for new characters.

    Raises:
        DataError: where data are missing or broken, or the split is unknown or asked of the digits.
    """
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    if data is None:
        if split != "maml":
            raise DataError(
                f"split: expected Omniglot for {split!r}, got scikit-learn's digits; name Omniglot's folder with --data"
            )
        digits = load_digits()
        return Images(digits.train, digits.test, digits.test, tuple(f"digit {i}" for i in range(10)))
    found = split_omniglot(data, split=split, validation=validation)
    return Images(found.train, found.validation if validation else found.test, found.test, found.test_names)
