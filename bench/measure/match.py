"""The match gate: no time is reported for a provider whose loss or gradient is wrong.

Truth is the reference provider (the plain loop) in float64. A provider passes when, for the loss and for every gradient
tensor, its error is at most ``FACTOR`` times the reference's own error in the provider's dtype, plus a slack relative
to the whole gradient (tensors whose true gradient is zero, as conv biases before BatchNorm have, are noise there). One
flipped ReLU can decide a single draw. So the draw is one in which the reference itself flipped none (its error would
excuse anything). A provider that fails it is judged by its median over several draws, against the upper quartile of the
reference's own errors: deep ReLU networks flip one in most draws, the reference as well as the provider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.measure.gate import median, within, worst
from bench.providers.base import Result

FACTOR = 4.0
SEEDS = 5
CALM = {torch.float32: 1e-5, torch.float64: 1e-14}
"""A reference error below this has no flipped ReLU in it."""
CALM_TRIES = 3
SLACK = {torch.float32: 1e-6, torch.float64: 1e-12}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _total(norms: list[float]) -> float:
    return math.sqrt(sum(n * n for n in norms))


def _double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tensors]


@dataclass(frozen=True)
class Judged:
    """``error``: relative l2 error of the whole gradient. ``score``: worst error over its tolerance; <= 1 passes."""

    error: float
    score: float


class Truth:
    """One seed's float64 result, and what the reference's own rounding costs in the dtype under test."""

    def __init__(self, truth: Result, baseline: Result, slack: float) -> None:
        self.slack = slack
        self.loss, self.grads = float(truth[0]), _double(truth[1])
        self.base_loss, self.base_grads = float(baseline[0]), _double(baseline[1])

    @cached_property
    def norms(self) -> list[float]:
        return [_norm(g) for g in self.grads]

    @cached_property
    def base_errors(self) -> list[float]:
        return [_norm(b - g) for b, g in zip(self.base_grads, self.grads, strict=True)]

    @cached_property
    def base_error(self) -> float:
        """The reference's relative l2 error over the whole gradient."""
        return _total(self.base_errors) / max(_total(self.norms), 1e-300)

    def judge(self, result: Result, usual: float | None = None) -> Judged:
        """Score a result; ``usual``: the reference's relative error to go by, this draw's where not given.

        Raises ValueError where the gradient has other tensors or shapes than the reference's.
        """
        grads = _double(result[1])
        shapes, expected = [tuple(g.shape) for g in grads], [tuple(g.shape) for g in self.grads]
        if shapes != expected:
            raise ValueError(f"gradient: expected tensors of shapes {expected}, got {shapes}")
        errors = [_norm(got - want) for got, want in zip(grads, self.grads, strict=True)]
        total, size = _total(self.norms), abs(self.loss)
        usual = self.base_error if usual is None else usual
        loss_tolerance = self._tolerance(abs(self.base_loss - self.loss), usual * size, self.slack * size)
        ratios = [abs(float(result[0]) - self.loss) / loss_tolerance]
        for error, base, norm in zip(errors, self.base_errors, self.norms, strict=True):
            ratios.append(error / self._tolerance(base, usual * norm, self.slack * total))
        # a baseline that overflowed has no tolerance
        score = worst(ratios) if math.isfinite(usual + _total(self.base_errors)) else math.nan
        return Judged(_total(errors) / max(total, 1e-300), score)

    @staticmethod
    def _tolerance(own_error: float, granted: float, slack: float) -> float:
        """A small tensor's own error may be tiny by luck: grant it the whole gradient's relative error too."""
        return FACTOR * max(own_error, granted) + slack + 1e-300


@dataclass(frozen=True)
class Match:
    """The verdict on one provider."""

    ok: bool
    error: float
    score: float
    seeds: int


class Gate:
    """Judges providers of one workload; the float64 truths are computed once and shared by all of them."""

    def __init__(self, reference: Callable[[torch.dtype, int], Result], dtype: torch.dtype) -> None:
        """``reference(dtype, seed)`` is the reference's result on the inputs of that seed."""
        self._reference, self._dtype = reference, dtype
        self._truths: dict[int, Truth] = {}

    def truth(self, seed: int) -> Truth:
        if seed not in self._truths:
            exact, own = self._reference(torch.float64, seed), self._reference(self._dtype, seed)
            self._truths[seed] = Truth(exact, own, SLACK[self._dtype])
        return self._truths[seed]

    @cached_property
    def seed(self) -> int:
        """The draw to judge by: the first calm one, or the calmest of a few."""
        for seed in range(CALM_TRIES):
            if self.truth(seed).base_error <= CALM[self._dtype]:
                return seed
        return min(range(CALM_TRIES), key=lambda seed: self.truth(seed).base_error)

    def check(self, first: Result, other_seeds: Callable[[int], Result]) -> Match:
        """``first``: the provider's result for ``seed``; the others are asked for only when that one fails."""
        judged = [self.truth(self.seed).judge(first)]
        if not judged[0].score <= 1 and math.isfinite(judged[0].score):
            judged = self._over_draws(first, other_seeds)
        error, score = median([j.error for j in judged]), median([j.score for j in judged])
        return Match(within(score, 1.0), error, score, len(judged))

    def _over_draws(self, first: Result, other_seeds: Callable[[int], Result]) -> list[Judged]:
        truths = [self.truth(seed) for seed in range(SEEDS)]
        usual = sorted(truth.base_error for truth in truths)[3 * SEEDS // 4]
        results = [first if seed == self.seed else other_seeds(seed) for seed in range(SEEDS)]
        return [truth.judge(result, usual) for truth, result in zip(truths, results, strict=True)]
