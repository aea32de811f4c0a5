"""scikit-learn's handwritten digits as few-shot images, for a trial without any download."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtml.tasks.errors import DataError
from mtml.tasks.omniglot import rotations

__all__ = ["DigitSplit", "load_digits"]

TRAIN_DIGITS = 5


class DigitSplit(NamedTuple):
    """uint8 [classes, drawings, 64] each; no digit is in both."""

    train: np.ndarray
    test: np.ndarray


def load_digits() -> DigitSplit:
    """The 1797 8x8 digits: 0-4 with their rotations train (20 classes), 5-9 test, 174 drawings of each.

    So the test asks for digits never seen, as a few-shot test should, of which there are only five: it shows that
    everything works rather than how good a network is.

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
    return DigitSplit(rotations(classes[:TRAIN_DIGITS]), classes[TRAIN_DIGITS:])
