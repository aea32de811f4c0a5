"""Learning rates as functions of the number of steps taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["exponential_decay", "linear_schedule", "polynomial_schedule"]

Schedule = Callable[[Any], Any]


def _number(count: Any) -> float:
    """As a number: in a quotient of integer tensors only float32 is left of a rate."""
    return count.item() if isinstance(count, Tensor) else count


@dataclass(frozen=True)
class _Polynomial:
    init_value: Any
    end_value: Any
    power: Any
    steps: int
    begin: int

    def __call__(self, count: Any) -> Any:
        if self.steps <= 0:
            return self.init_value
        taken = min(max(_number(count) - self.begin, 0), self.steps)
        return (self.init_value - self.end_value) * (1.0 - taken / self.steps) ** self.power + self.end_value


def polynomial_schedule(
    init_value: Any, end_value: Any, power: Any, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """(init - end) (1 - k / steps)^power + end, k being the steps since `transition_begin`, between 0 and steps.

    Args:
        init_value, end_value, power: numbers, or scalar tensors.
        transition_steps: how many steps the way takes; none: the rate stays at `init_value`.
        transition_begin: how many steps it stays there before.

    Example:
        >>> polynomial_schedule(1.0, 0.0, power=2, transition_steps=10)(5)
        0.25
    """
    return _Polynomial(init_value, end_value, power, transition_steps, max(transition_begin, 0))


def linear_schedule(init_value: Any, end_value: Any, transition_steps: int, transition_begin: int = 0) -> Schedule:
    """`polynomial_schedule` of power 1."""
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


@dataclass(frozen=True)
class _Exponential:
    init_value: Any
    rate: Any
    begin: int
    steps: int
    staircase: bool
    end_value: Any

    def __call__(self, count: Any) -> Any:
        taken = _number(count) - self.begin
        if self.steps <= 0 or self.rate == 0:
            return self.init_value
        power = taken / self.steps
        power = math.floor(power) if self.staircase else power
        value = self.init_value if taken <= 0 else self.init_value * self.rate**power
        if self.end_value is None:
            return value
        return max(value, self.end_value) if self.rate < 1.0 else min(value, self.end_value)


def exponential_decay(
    init_value: Any,
    decay_rate: Any,
    transition_begin: int = 0,
    transition_steps: int = 1,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """init * decay_rate^(k / steps), k being the steps since `transition_begin`, and not beyond `end_value`.

    Args:
        init_value, decay_rate: numbers, or scalar tensors; a rate of 0 leaves `init_value`.
        transition_begin: how many steps it stays at `init_value`.
        transition_steps: in how many steps it changes by a factor of `decay_rate`; none: it stays.
        staircase: round k / steps down.
        end_value: a bound; None for none.

    Example:
        >>> exponential_decay(1.0, 0.5, transition_steps=10, staircase=True)(25)
        0.25
    """
    begin = max(transition_begin, 0)
    return _Exponential(init_value, decay_rate, begin, transition_steps, staircase, end_value)
