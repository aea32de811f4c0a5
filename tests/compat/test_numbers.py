"""Numbers with a range in the originals' places: what they take for granted is named where it does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from mtml.compat import learn2learn, torchopt
from mtml.compat.torchmeta import toy, transforms

DATA = learn2learn.data.MetaDataset(TensorDataset(torch.arange(12.0), torch.arange(12) % 3))
T = learn2learn.data.transforms


def split(samples: Any) -> Any:
    return transforms.ClassSplitter(toy.Sinusoid(9, num_tasks=3)[0], num_train_per_class=samples, num_test_per_class=1)


def share(weight: Any) -> Any:
    return transforms.WeightedClassSplitter(weights={"train": weight, "test": 0.1})


COUNTS: dict[str, Callable[[Any], Any]] = {
    "num_tasks": lambda v: toy.Sinusoid(3, num_tasks=v),
    "num_samples_per_task": toy.Sinusoid,
    "num_samples_per_class['train']": split,
    "num_classes": transforms.Categorical,
    "n": lambda v: T.NWays(DATA, v)(None),
    "k": lambda v: T.KShots(DATA, v)(None),
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "noise_std": lambda v: toy.Sinusoid(3, noise_std=v),
    "weights['train']": share,
    "max_norm": torchopt.clip_grad_norm,
    "betas[0]": lambda v: torchopt.adam(0.1, betas=(v, 0.9)),
    "rho": lambda v: torchopt.adadelta(0.1, rho=v),
}


@pytest.mark.parametrize(("name", "make"), COUNTS.items())
def test_counts(name: str, make: Callable[[Any], Any]) -> None:
    make(np.int64(2))
    for value in (-1, -2):
        with pytest.raises(ValueError, match=r"expected an int of at least .*, got -") as error:
            make(value)
        assert str(error.value).startswith(f"{name}: ")
    for value in (1.5, math.nan, True, "2", [2]):
        with pytest.raises(TypeError, match=r"expected an int of at least .*, got ") as error:
            make(value)
        assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize(("name", "make"), NUMBERS.items())
def test_numbers(name: str, make: Callable[[Any], Any]) -> None:
    make(0.25)
    make(0)
    for value in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected .*at least 0, got ") as error:
            make(value)
        assert str(error.value).startswith(f"{name}: ")
    for value in ("0.5", [0.5]):
        with pytest.raises(TypeError, match=r"expected a number.*, got ") as error:
            make(value)
        assert str(error.value).startswith(f"{name}: ")


def test_the_dampening_of_momentum_is_a_finite_number() -> None:
    torchopt.sgd(0.1, 0.9, dampening=-0.5)
    for value in (math.nan, math.inf, "0.1", None):
        with pytest.raises((TypeError, ValueError), match=r"dampening: expected a .*number.*, got "):
            torchopt.sgd(0.1, 0.9, dampening=value)  # type: ignore[arg-type]


def test_tasks_of_a_taskset() -> None:
    for value in (0, -2, 1.5, math.nan, math.inf, True, "5", None):
        with pytest.raises(ValueError, match=r"num_tasks: expected -1 \(endless\) or a positive int, got "):
            learn2learn.data.Taskset(DATA, [T.LoadData(DATA)], num_tasks=value)  # type: ignore[arg-type]
    assert len(learn2learn.data.Taskset(DATA, [T.LoadData(DATA)], num_tasks=np.int64(3))) == 3  # type: ignore[arg-type]
