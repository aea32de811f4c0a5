"""The toy data sets with their tasks split into train and test."""

from __future__ import annotations

import warnings
from typing import Any

from mtml.compat.torchmeta.toy.curves import Curves
from mtml.compat.torchmeta.toy.harmonic import Harmonic
from mtml.compat.torchmeta.toy.sinusoid import Sinusoid
from mtml.compat.torchmeta.transforms.splitters import ClassSplitter

__all__ = ["harmonic", "sinusoid"]


def sinusoid(
    shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs: Any
) -> Any:
    """`Sinusoid` whose tasks are {"train": `shots` samples, "test": `test_shots` samples (as many by default)}.

    Args:
        shuffle: draw which samples are which.
        seed: of the data set.
        kwargs: of `Sinusoid`.
    """
    return _split(Sinusoid, shots, shuffle, test_shots, seed, kwargs)


def harmonic(
    shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs: Any
) -> Any:
    """The same of `Harmonic`; arguments as of `sinusoid`."""
    return _split(Harmonic, shots, shuffle, test_shots, seed, kwargs)


def _split(
    kind: type[Curves], shots: int, shuffle: bool, test_shots: int | None, seed: int | None, kwargs: dict[str, Any]
) -> Any:
    samples = kwargs.pop("num_samples_per_task", None)
    if samples is not None:
        warnings.warn("shots: not used, since num_samples_per_task is given", stacklevel=3)
        shots = samples // 2 if test_shots is None else samples - test_shots
        if shots <= 0:
            raise ValueError(f"test_shots: expected fewer than the {samples} samples of a task, got {test_shots}")
    test_shots = shots if test_shots is None else test_shots
    dataset = kind(num_samples_per_task=shots + test_shots, **kwargs)
    dataset = ClassSplitter(dataset, shuffle=shuffle, num_train_per_class=shots, num_test_per_class=test_shots)
    dataset.seed(seed)
    return dataset
