"""Numbers with a range, as every constructor checks them: above 0, at least 0, within two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mtml
from mtml import balance, inner, weighting
from mtml.tasks import Languages, Regions
from mtml_kernels.checks import check_number
from mtml_kernels.losses import HeadLoss, LossSpec

NO_NUMBERS: list[Any] = ["1", None, True, 1j, [1.0], torch.ones(2)]
GRAM = np.eye(2)


def net() -> nn.Linear:
    return nn.Linear(2, 1)


ABOVE_0: dict[str, Callable[[Any], Any]] = {
    "temperature": lambda v: weighting.DWA(v),
    "mu": lambda v: weighting.STCH(v),
    "gamma": lambda v: balance.MoDo(2, v),
    "strength": lambda v: mtml.IMAML(net(), 0.1, strength=v),
    "strength of R2D2": lambda v: mtml.R2D2(net(), 2, strength=v),
}
AT_LEAST_0: dict[str, Callable[[Any], Any]] = {
    "penalty": lambda v: weighting.COSMOS(v),
    "lr": lambda v: weighting.FAMO(v),
    "decay": lambda v: weighting.FAMO(decay=v),
    "alpha": lambda v: weighting.GradNorm(v),
    "rho": lambda v: balance.MoDo(2, rho=v),
    "multi_step_epochs": lambda v: mtml.MAMLPlusPlus(net(), multi_step_epochs=v),
    "noise": lambda v: Regions(noise=v),
}
WITHIN: dict[str, Callable[[Any], Any]] = {
    "beta": lambda v: balance.GradVac(2, v),
    "order": lambda v: Languages(order=v),
    "alpha": lambda v: balance.METHODS["fairgrad"](GRAM, alpha=v),
    "c": lambda v: balance.METHODS["cagrad"](GRAM, c=v),
}
FINITE: dict[str, Callable[[Any], Any]] = {
    "init": lambda v: weighting.Uncertainty(v),
    "min": lambda v: mtml.InnerLR(net(), min=v) if v is not None else check_number("min", v),
    "max": lambda v: mtml.InnerLR(net(), max=v) if v is not None else check_number("max", v),
    "damping": lambda v: mtml.IMAML(net(), 0.1, damping=v),
    "scale": lambda v: mtml.R2D2(net(), 2, scale=v),
}
EVERY = [*ABOVE_0.items(), *AT_LEAST_0.items(), *WITHIN.items(), *FINITE.items()]


@pytest.mark.parametrize(("name", "make"), EVERY)
@pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_named(name: str, make: Callable[[Any], Any], value: Any) -> None:
    kind = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(kind, match=rf"^{name.split()[0]}: expected .*, got "):
        make(value)


@pytest.mark.parametrize(("name", "make"), EVERY)
def test_numbers_of_numpy_and_of_torch_are_numbers(name: str, make: Callable[[Any], Any]) -> None:
    for value in (np.float32(0.5), torch.tensor(0.5), 0.5):
        make(value)


@pytest.mark.parametrize(("name", "make"), ABOVE_0.items())
def test_above_0(name: str, make: Callable[[Any], Any]) -> None:
    for value in (0, -0.0, -1, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=rf"^{name.split()[0]}: expected above 0, got "):
            make(value)


@pytest.mark.parametrize(("name", "make"), AT_LEAST_0.items())
def test_at_least_0(name: str, make: Callable[[Any], Any]) -> None:
    make(0)
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 0, got -1"):
        make(-1)


@pytest.mark.parametrize(("name", "make"), WITHIN.items())
def test_within_bounds(name: str, make: Callable[[Any], Any]) -> None:
    for value in (-1, 11):
        with pytest.raises(ValueError, match=rf"^{name}: expected in \[0.*, got {value}"):
            make(value)


@pytest.mark.parametrize("make", [HeadLoss, LossSpec])
@pytest.mark.parametrize("name", ["delta", "label_smoothing"])
def test_options_of_losses(make: Any, name: str) -> None:
    for value in (*NO_NUMBERS[:3], [1.0]):
        with pytest.raises(TypeError, match=f"expected a number as {name}, got "):
            make("huber", **{name: value})
    for value in (math.nan, -1.0):
        with pytest.raises(ValueError, match=f"expected {name} "):
            make("huber", **{name: value})


@pytest.mark.parametrize("value", ["1", None, True])
def test_numbers_by_head(value: Any) -> None:
    for make in (weighting.Fixed, lambda given: weighting.STCH(ideal=given), lambda given: weighting.FAMO(lower=given)):
        with pytest.raises(TypeError, match=r"weighting: expected finite .*, got .* for 'a'"):
            make({"a": value})


def test_a_dampening_is_finite() -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="dampening: expected a number of finite size, got "):
            inner.SGD(0.9, value)
    inner.SGD(0.9, -0.5)
