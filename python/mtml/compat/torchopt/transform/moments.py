"""Transformations that scale updates by their own past: Adam and its relatives, by the formulas of torch.optim.

The square root has the derivative 0 at 0: a gradient that is exactly zero leaves no NaN in a meta-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mtml.compat.torchopt.base import GradientTransformation, Kernel, Leaves, transformation
from mtml.compat.torchopt.transform.leaves import (
    Tensors,
    added,
    counted,
    divided,
    present,
    products,
    put,
    scaled,
    settled,
    zero_counts,
    zeros,
)
from mtml.compat.torchopt.transform.simple import at_least
from mtml_kernels.reference.update import quotient, root

__all__ = [
    "ScaleByAdadeltaState",
    "ScaleByAdam",
    "ScaleByAdamState",
    "ScaleByAdamaxState",
    "ScaleByRAdamState",
    "ScaleByRStdDevState",
    "ScaleByRms",
    "ScaleByRmsState",
    "ScaleByRssState",
    "scale_by_accelerated_adam",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
]


def _mean(old: Tensors, new: Tensors, decay: float) -> Tensors:
    return added(scaled(old, decay), new, 1.0 - decay)


def _over_root(x: Tensors, square: Tensors, eps: float, eps_root: float = 0.0) -> Tensors:
    """x / (sqrt(square + eps_root) + eps)."""
    if eps_root:
        return divided(x, [(s + eps_root).sqrt() + eps for s in square])
    roots = [(root(s) if s.requires_grad else s.sqrt()) + eps for s in square]
    return divided(x, roots) if eps else [quotient(a, b) for a, b in zip(x, roots, strict=True)]


def _take(at: Sequence[int], *lists: Leaves) -> list[list[Any]]:
    return [[each[i] for i in at] for each in lists]


def _keep(old: Leaves, at: Sequence[int], new: Tensors, inplace: bool) -> list[Any]:
    return settled(old, put(old, at, new), inplace)


def _below_one(name: str, value: float) -> None:
    at_least(name, value)
    if not value < 1.0:
        raise ValueError(f"{name}: expected a number of at least 0 and below 1, got {value}")


def _check(b1: float, b2: float, eps: float) -> None:
    for name, beta in (("betas[0]", b1), ("betas[1]", b2)):
        _below_one(name, beta)
    at_least("eps", eps)


class ScaleByAdamState(NamedTuple):
    mu: Leaves
    nu: Leaves
    count: Leaves  # type: ignore[assignment]  # the original's name, a method of tuples


@dataclass(frozen=True, eq=False)
class ScaleByAdam(Kernel):
    b1: float
    b2: float
    eps: float
    eps_root: float
    moment_requires_grad: bool

    def start(self, params: Leaves) -> ScaleByAdamState:
        mu, nu = zeros(params, self.moment_requires_grad), zeros(params, self.moment_requires_grad)
        return ScaleByAdamState(mu, nu, zero_counts(params))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, mu, nu = _take(at, grads, state.mu, state.nu)
        count, steps = counted(state.count, at)
        m, v = _mean(mu, g, self.b1), _mean(nu, products(g, g), self.b2)
        mean = scaled(m, [1.0 / (1.0 - self.b1**t) for t in steps])
        square = scaled(v, [1.0 / (1.0 - self.b2**t) for t in steps])
        found = _over_root(mean, square, self.eps, self.eps_root)
        kept = ScaleByAdamState(_keep(state.mu, at, m, inplace), _keep(state.nu, at, v, inplace), count)
        return _keep(grads, at, found, inplace), kept


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0, moment_requires_grad: bool = False
) -> GradientTransformation:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980): the mean over the root of the mean square, both corrected for zeros.

    Args:
        eps: added to the root.
        eps_root: added under it.
        moment_requires_grad: the zeros that the moments begin with are leaves that require grad.
    """
    _check(b1, b2, eps)
    at_least("eps_root", eps_root)
    return transformation(ScaleByAdam(b1, b2, eps, eps_root, moment_requires_grad))


scale_by_accelerated_adam = scale_by_adam  # all of Adam here is as fast as it gets; the results are the same


class ScaleByAdamaxState(NamedTuple):
    mu: Leaves
    nu: Leaves
    t: int


@dataclass(frozen=True, eq=False)
class ScaleByAdamax(Kernel):
    b1: float
    b2: float
    eps: float
    moment_requires_grad: bool

    def start(self, params: Leaves) -> ScaleByAdamaxState:
        return ScaleByAdamaxState(zeros(params, self.moment_requires_grad), zeros(params, self.moment_requires_grad), 1)

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, mu, nu = _take(at, grads, state.mu, state.nu)
        m = _mean(mu, g, self.b1)
        n = [torch.maximum(old * self.b2, new.abs() + self.eps) for old, new in zip(nu, g, strict=True)]
        mean = scaled(m, 1.0 / (1.0 - self.b1**state.t))
        found = divided(mean, n) if self.eps else [quotient(a, b) for a, b in zip(mean, n, strict=True)]
        moments = _keep(state.mu, at, m, inplace), _keep(state.nu, at, n, inplace)
        return _keep(grads, at, found, inplace), ScaleByAdamaxState(*moments, state.t + 1)


def scale_by_adamax(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """AdaMax (Kingma, Ba 2015, section 7.1): the mean over the decaying maximum."""
    _check(b1, b2, eps)
    return transformation(ScaleByAdamax(b1, b2, eps, moment_requires_grad))


class ScaleByRAdamState(NamedTuple):
    mu: Leaves
    nu: Leaves
    t: int


@dataclass(frozen=True, eq=False)
class ScaleByRAdam(Kernel):
    b1: float
    b2: float
    eps: float
    moment_requires_grad: bool

    def start(self, params: Leaves) -> ScaleByRAdamState:
        return ScaleByRAdamState(zeros(params, self.moment_requires_grad), zeros(params, self.moment_requires_grad), 1)

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, mu, nu = _take(at, grads, state.mu, state.nu)
        m, v = _mean(mu, g, self.b1), _mean(nu, products(g, g), self.b2)
        rectified = self._rectified(state.t)
        if rectified is None:
            found = scaled(m, 1.0 / (1.0 - self.b1**state.t))
        else:
            found = _over_root(scaled(m, rectified / (1.0 - self.b1**state.t)), v, self.eps)
        moments = _keep(state.mu, at, m, inplace), _keep(state.nu, at, v, inplace)
        return _keep(grads, at, found, inplace), ScaleByRAdamState(*moments, state.t + 1)

    def _rectified(self, t: int) -> float | None:
        """The factor by which the adaptive step is trusted; None where its variance is unbounded."""
        limit, rest = 2.0 / (1.0 - self.b2) - 1.0, 1.0 - self.b2**t
        length = limit - 2.0 * t * self.b2**t / rest
        if length <= 5.0:
            return None
        trusted = (length - 4.0) * (length - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * length)
        return math.sqrt(rest * trusted)


def scale_by_radam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """RAdam (Liu et al. 2020, arXiv:1908.03265): Adam once its mean square can be trusted, the mean before."""
    _check(b1, b2, eps)
    return transformation(ScaleByRAdam(b1, b2, eps, moment_requires_grad))


class ScaleByAdadeltaState(NamedTuple):
    mu: Leaves  # of squared gradients
    nu: Leaves  # of squared updates


@dataclass(frozen=True, eq=False)
class ScaleByAdadelta(Kernel):
    rho: float
    eps: float
    moment_requires_grad: bool

    def start(self, params: Leaves) -> ScaleByAdadeltaState:
        return ScaleByAdadeltaState(zeros(params, self.moment_requires_grad), zeros(params, self.moment_requires_grad))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, mu, nu = _take(at, grads, state.mu, state.nu)
        m = _mean(mu, products(g, g), self.rho)
        sizes = [((n + self.eps) / (s + self.eps)).sqrt() for n, s in zip(nu, m, strict=True)]
        found = products(g, sizes)
        n = _mean(nu, products(found, found), self.rho)
        kept = ScaleByAdadeltaState(_keep(state.mu, at, m, inplace), _keep(state.nu, at, n, inplace))
        return _keep(grads, at, found, inplace), kept


def scale_by_adadelta(
    rho: float = 0.9, eps: float = 1e-6, moment_requires_grad: bool = False
) -> GradientTransformation:
    """Adadelta (Zeiler 2012, arXiv:1212.5701): updates of the size of earlier ones."""
    _below_one("rho", rho)
    at_least("eps", eps)
    return transformation(ScaleByAdadelta(rho, eps, moment_requires_grad))


class ScaleByRmsState(NamedTuple):
    nu: Leaves


class ScaleByRStdDevState(NamedTuple):
    mu: Leaves
    nu: Leaves


def _filled(params: Leaves, value: float) -> list[Any]:
    return [None if p is None else torch.full_like(p, value, requires_grad=False) for p in params]


@dataclass(frozen=True, eq=False)
class ScaleByRms(Kernel):
    """By the root of the mean square; centered: by the deviation from the mean."""

    alpha: float
    eps: float
    initial_scale: float
    centered: bool

    def start(self, params: Leaves) -> ScaleByRmsState | ScaleByRStdDevState:
        nu = _filled(params, self.initial_scale)
        return ScaleByRStdDevState(zeros(params), nu) if self.centered else ScaleByRmsState(nu)

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, nu = _take(at, grads, state.nu)
        v = _mean(nu, products(g, g), self.alpha)
        kept = [_keep(state.nu, at, v, inplace)]
        spread = v
        if self.centered:
            m = _mean(_take(at, state.mu)[0], g, self.alpha)
            kept.insert(0, _keep(state.mu, at, m, inplace))
            spread = added(v, products(m, m), -1.0)
        found = _over_root(g, spread, self.eps)
        new = ScaleByRStdDevState(*kept) if self.centered else ScaleByRmsState(*kept)
        return _keep(grads, at, found, inplace), new


def _rms(alpha: float, eps: float, initial_scale: float, centered: bool) -> GradientTransformation:
    at_least("alpha", alpha)
    at_least("eps", eps)
    return transformation(ScaleByRms(alpha, eps, initial_scale, centered))


def scale_by_rms(alpha: float = 0.9, eps: float = 1e-8, initial_scale: float = 0.0) -> GradientTransformation:
    """RMSProp (Hinton 2012): over the root of the mean square, which begins with `initial_scale`."""
    return _rms(alpha, eps, initial_scale, False)


def scale_by_stddev(alpha: float = 0.9, eps: float = 1e-8, initial_scale: float = 0.0) -> GradientTransformation:
    """RMSProp, centred (Graves 2013, arXiv:1308.0850): over the deviation from the mean."""
    return _rms(alpha, eps, initial_scale, True)


class ScaleByRssState(NamedTuple):
    sum_of_squares: Leaves


@dataclass(frozen=True, eq=False)
class ScaleByRss(Kernel):
    initial_accumulator_value: float
    eps: float

    def start(self, params: Leaves) -> ScaleByRssState:
        return ScaleByRssState(_filled(params, self.initial_accumulator_value))

    def step(self, grads: Leaves, state: Any, params: Leaves | None, inplace: bool) -> tuple[list[Any], Any]:
        at = present(grads)
        g, old = _take(at, grads, state.sum_of_squares)
        total = added(old, products(g, g))
        found = _over_root(g, total, self.eps)
        return _keep(grads, at, found, inplace), ScaleByRssState(_keep(state.sum_of_squares, at, total, inplace))


def scale_by_rss(initial_accumulator_value: float = 0.0, eps: float = 1e-10) -> GradientTransformation:
    """AdaGrad (Duchi, Hazan, Singer 2011): over the root of the sum of squares, which begins with a value."""
    at_least("initial_accumulator_value", initial_accumulator_value)
    at_least("eps", eps)
    return transformation(ScaleByRss(initial_accumulator_value, eps))
