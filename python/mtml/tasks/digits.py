"""scikit-learn's handwritten digits as few-shot images, for a trial without any download."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtml.tasks.errors import DataError

__all__ = ["DigitSplit", "load_digits"]

TEST_SHARE = 0.25


class DigitSplit(NamedTuple):
    """uint8 [10, drawings, 64] each; no drawing is in both."""

    train: np.ndarray
    test: np.ndarray


def load_digits() -> DigitSplit:
    """The 1797 8x8 digits, 174 drawings of each: three quarters of them to train, the others to test.

    Both halves have all ten digits, since ten classes are too few to keep some from training: tasks are tested on new
    drawings, not on new classes. It shows that everything works, not how well unseen classes are learned.

    Raises:
        DataError: where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError(
            "the digits (used without --data) need scikit-learn, which is not installed: "
            'pip install "mtml-kernels[train]"'
        ) from error
    data = load()
    fewest = int(np.bincount(data.target).min())
    pixels = np.round(data.data * (255 / 16)).astype(np.uint8)
    classes = np.stack([pixels[data.target == c][:fewest] for c in range(10)])  # [10, 174, 64]
    train = round(fewest * (1 - TEST_SHARE))
    return DigitSplit(classes[:, :train], classes[:, train:])
