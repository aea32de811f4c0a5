"""The fused engine beside the plain loop: do their meta-gradients agree, and how fast is each."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import mtml
from mtml.tasks.task_batch import TaskBatch
from mtml.train.adam import FlatAdam
from mtml.train.methods import engine_step, inner_rates, plain_losses, plain_step

__all__ = ["TOLERANCE", "Comparison", "compare"]

TOLERANCE = 1e-4
EXACT, FLIPPED = 1e-8, 0.05  # in float64; and what a flipped ReLU may do in float32


class Comparison(NamedTuple):
    """Meta-iterations per second of both ways, and the relative difference of their meta-gradients.

    `rounding` is that between the plain loop in float32 and in float64. Where losses are nearly zero, as at the end of
    a training, gradients are small differences of large terms, and it can exceed the tolerance all by itself. `exact`
    is the difference of both ways in float64.
    """

    engine: float
    plain: float
    gradients: float
    rounding: float
    exact: float = math.nan

    @property
    def tolerance(self) -> float:
        """1e-4, or a few times PyTorch's own rounding error where that is more."""
        return max(TOLERANCE, 3 * self.rounding) if self.rounding < 0.01 else TOLERANCE

    @property
    def agree(self) -> bool:
        """Whether the meta-gradients are equal but for rounding; not so where one is NaN.

        In float32 a single ReLU among millions that rounding opens or shuts moves a gradient by 1e-3, in either way and
        in every third batch of a convolutional network. In float64 it hardly happens, so that decides then.
        """
        return self.gradients < self.tolerance or self._flipped

    @property
    def _flipped(self) -> bool:
        return self.exact < EXACT and TOLERANCE <= self.gradients < FLIPPED

    def __str__(self) -> str:
        verdict = "they agree" if self.agree else f"THEY DISAGREE (expected below {self.tolerance:.1e})"
        if self.gradients >= self.tolerance and self._flipped:
            verdict += " (in float32, rounding moved a ReLU)"
        exact = "" if math.isnan(self.exact) else f"; in float64 {self.exact:.1e}"
        return (
            f"fused engine        {self.engine:10.1f} meta-iterations/s\n"
            f"plain PyTorch loop  {self.plain:10.1f} meta-iterations/s\n"
            f"ratio               {self.engine / self.plain:10.1f}\n"
            f"meta-gradients at the trained parameters: relative difference {self.gradients:.1e} "
            f"(float32 rounding of the loop alone: {self.rounding:.1e}){exact}, {verdict}"
        )


def compare(
    maml: mtml.MAML, stream: Callable[[], Iterator[TaskBatch]], *, loss: str, lr: float, seconds: float
) -> Comparison:
    """Compare the gradients at the learner's parameters, then meta-train copies of it both ways for `seconds` in all.

    Both ways train in turn in short bursts, so that a machine whose speed drifts slows both alike; task generation and
    the outer Adam are counted in both. `stream` makes a new stream of meta-batches.
    """
    differences = _gradient_differences(maml, next(stream()), loss)
    ours, theirs = copy.deepcopy(maml), copy.deepcopy(maml)
    fused = engine_step(ours, FlatAdam(ours.parameters(), lr=lr), stream())
    plain = plain_step(theirs, torch.optim.Adam(theirs.parameters(), lr=lr), stream(), loss)
    fused(), plain()  # what happens once only
    rates: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + seconds
    while not rates[0] or time.perf_counter() < stop:
        for step, found in zip((fused, plain), rates, strict=True):
            found.append(_rate(step, min(0.25, seconds / 4)))
    return Comparison(statistics.median(rates[0]), statistics.median(rates[1]), *differences)


def _rate(step: Callable[[], Tensor], seconds: float) -> float:
    """Steps per second over a burst of at least `seconds`."""
    count, start = 0, time.perf_counter()
    while True:
        step()
        count += 1
        if (spent := time.perf_counter() - start) >= seconds:
            return count / spent


def _gradient_differences(maml: mtml.MAML, batch: TaskBatch, loss: str) -> tuple[float, float, float]:
    """Relative differences over all meta-parameters: engine to plain loop, plain loop to itself in float64, and engine
    to plain loop in float64."""
    double, exact = copy.deepcopy(maml).double(), batch.to(torch.float64)
    ours, plain = _engine_gradients(maml, batch), _plain_gradients(maml, batch, loss)
    truth = _plain_gradients(double, exact, loss)
    return _relative(ours, plain), _relative(plain, truth), _relative(_engine_gradients(double, exact), truth)


def _engine_gradients(maml: mtml.MAML, batch: TaskBatch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(maml.meta_loss(batch).mean(), [p for p in maml.parameters() if p.requires_grad])


def _plain_gradients(maml: mtml.MAML, batch: TaskBatch, loss: str) -> tuple[Tensor, ...]:
    losses = plain_losses(maml.module, batch, rates=inner_rates(maml), steps=maml.steps, loss=loss)
    return torch.autograd.grad(losses.mean(), [p for p in maml.parameters() if p.requires_grad])


def _relative(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """|found - expected| / |expected| of all tensors together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return (error / size) ** 0.5 if size > 0 else math.nan
