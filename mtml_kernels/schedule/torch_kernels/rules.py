"""What `update` is made of: the numbers of a rule at one step, its direction d, and the way back from d.

With q = x / y the quotient that is 0 where y is, and sqrt's derivative 0 where it is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_kernels.schedule.kernels import Rule
from mtml_kernels.schema.update import HYPERS

__all__ = ["Adjoint", "Direction", "Numbers"]

Moments = Sequence[Tensor | None]  # an absent one is zero


class Numbers:
    """The hyper-parameters, scalars in double precision: 1 - 0.999 keeps its digits."""

    def __init__(self, rule: Rule, hyper: Tensor) -> None:
        self.spec, self.step, self.vector = rule.spec, rule.step, hyper
        self.of = dict(zip(HYPERS, hyper.unbind(), strict=True))

    @functools.cached_property
    def rest(self) -> tuple[Tensor, Tensor]:
        """1 - beta1, 1 - beta2"""
        first, second = (1 - self._betas()).unbind()
        return first, second

    @functools.cached_property
    def bias(self) -> tuple[Tensor, Tensor]:
        """B1, B2"""
        first, second = (1 - self._betas().pow(self.step + 1)).reciprocal_().unbind()
        return first, second

    def bias_slopes(self) -> tuple[Tensor, Tensor]:
        """dB1 / dbeta1, dB2 / dbeta2"""
        slopes = self._betas().pow(self.step).mul_(self.step + 1)
        first, second = self.bias
        return slopes[0] * first * first, slopes[1] * second * second

    def _betas(self) -> Tensor:
        at = HYPERS.index("beta1")
        return self.vector[at : at + 2]


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is"""
    return (x / y).masked_fill_(y == 0, 0.0)


def _plus(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def _mixed(old: Tensor | None, weight: Tensor, new: Tensor) -> Tensor:
    """weight old + new"""
    return new if old is None else new + old * weight


class Direction:
    """One step of a tensor: d, the moments after it, and what lies between. g is clipped already."""

    def __init__(self, numbers: Numbers, theta: Tensor, g: Tensor, s: Moments) -> None:
        self.numbers, spec = numbers, numbers.spec
        self.g = g + theta * numbers.of["weight_decay"] if spec.decayed and not spec.decoupled else g
        self.moments: list[Tensor] = []
        rules = {"adam": self._adam, "rmsprop": self._rmsprop, "sgd": self._sgd}
        self.d = rules[spec.rule](s)

    def _divide_by(self, x: Tensor) -> None:
        """spread = sqrt(x + root), divisor = spread + eps"""
        numbers = self.numbers.of
        self.spread = (x + numbers["eps_root"]).clamp_(min=0.0).sqrt_()
        self.divisor = self.spread + numbers["eps"]

    def _adam(self, s: Moments) -> Tensor:
        numbers, (rest1, rest2), (bias1, bias2) = self.numbers.of, self.numbers.rest, self.numbers.bias
        self.m = _mixed(s[0], numbers["beta1"], self.g * rest1)
        self.v = _mixed(s[1], numbers["beta2"], self.g * self.g * rest2)
        self.moments = [self.m, self.v]
        self._divide_by(self.v * bias2)
        return _quotient(self.m * bias1, self.divisor)

    def _rmsprop(self, s: Moments) -> Tensor:
        numbers, (_, rest2), spec = self.numbers.of, self.numbers.rest, self.numbers.spec
        self.v = _mixed(s[0], numbers["beta2"], self.g * self.g * rest2)
        self.moments = [self.v]
        x = self.v
        if spec.centered:
            self.m = _mixed(s[1], numbers["beta2"], self.g * rest2)
            self.moments.append(self.m)
            x = torch.addcmul(x, self.m, self.m, value=-1)
        self._divide_by(x)
        self.scaled = _quotient(self.g, self.divisor)
        if not spec.momentum:
            return self.scaled
        self.moments.append(_mixed(s[len(self.moments)], numbers["momentum"], self.scaled))
        return self.moments[-1]

    def _sgd(self, s: Moments) -> Tensor:
        numbers, spec = self.numbers.of, self.numbers.spec
        if not spec.momentum:
            return self.g
        first = self.numbers.step == 0
        buffer = self.g if first else _mixed(s[0], numbers["momentum"], self.g * (1 - numbers["dampening"]))
        self.moments = [buffer]
        return self.g + buffer * numbers["momentum"] if spec.nesterov else buffer


class Adjoint:
    """From the cotangents dbar of d and mu of the moments after the step to those of g (`g`), of the moments before it
    (`before`) and, by `count`, of the numbers.
    """

    def __init__(self, done: Direction, s: Moments, mu: Moments, dbar: Tensor, counting: bool) -> None:
        self.done, self.s, self.mu, self.counting = done, s, mu, counting
        self.numbers: dict[str, Tensor] = {}
        self.before: list[Tensor | None] = [None, None, None]
        rules = {"adam": self._adam, "rmsprop": self._rmsprop, "sgd": self._sgd}
        self.g = rules[done.numbers.spec.rule](dbar)

    def count(self, name: str, term: Callable[[], Tensor]) -> None:
        """Adds the sum of a term to the cotangent of a number, where those are wanted."""
        if self.counting:
            part = term().sum(dtype=self.done.numbers.vector.dtype)
            self.numbers[name] = self.numbers[name] + part if name in self.numbers else part

    def hyper(self) -> Tensor:
        """The cotangents of the numbers  # [8]"""
        vector = self.done.numbers.vector
        zero = vector.new_zeros(())
        return torch.stack([self.numbers.get(name, zero) for name in HYPERS])

    def _minus(self, i: int, x: Tensor) -> Tensor:
        """s[i] - x"""
        old = self.s[i]
        return -x if old is None else old - x

    def _under(self, qbar: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """(the cotangent of the numerator, that of x + root) of the quotient q over sqrt(x + root) + eps."""
        over = _quotient(qbar, self.done.divisor)
        away = over * q
        xbar = (away / (self.done.spread * -2)).masked_fill_(self.done.spread == 0, 0.0)
        self.count("eps", lambda: -away)
        self.count("eps_root", lambda: xbar)
        return over, xbar

    def _adam(self, dbar: Tensor) -> Tensor:
        done, numbers = self.done, self.done.numbers
        (rest1, rest2), (bias1, bias2) = numbers.rest, numbers.bias
        over, xbar = self._under(dbar, done.d)
        mbar, vbar = _plus(over * bias1, self.mu[0]), _plus(xbar * bias2, self.mu[1])
        self.before[:2] = mbar * numbers.of["beta1"], vbar * numbers.of["beta2"]
        if self.counting:
            slope1, slope2 = numbers.bias_slopes()
            self.count("beta1", lambda: mbar * self._minus(0, done.g) + over * done.m * slope1)
            self.count("beta2", lambda: vbar * self._minus(1, done.g * done.g) + xbar * done.v * slope2)
        return torch.addcmul(mbar * rest1, done.g, vbar * (2 * rest2))

    def _rmsprop(self, dbar: Tensor) -> Tensor:
        done, numbers = self.done, self.done.numbers
        spec, (_, rest2), beta2 = numbers.spec, numbers.rest, numbers.of["beta2"]
        qbar, at = dbar, len(done.moments) - 1
        if spec.momentum:
            qbar, old = _plus(dbar, self.mu[at]), self.s[at]
            self.before[at] = qbar * numbers.of["momentum"]
            if old is not None:
                self.count("momentum", lambda: qbar * old)
        over, xbar = self._under(qbar, done.scaled)
        vbar = _plus(xbar, self.mu[0])
        self.before[0] = vbar * beta2
        self.count("beta2", lambda: vbar * self._minus(0, done.g * done.g))
        g = torch.addcmul(over, done.g, vbar * (2 * rest2))
        if not spec.centered:
            return g
        abar = _plus(done.m * xbar * -2, self.mu[1])
        self.before[1] = abar * beta2
        self.count("beta2", lambda: abar * self._minus(1, done.g))
        return g + abar * rest2

    def _sgd(self, dbar: Tensor) -> Tensor:
        numbers, spec, old = self.done.numbers.of, self.done.numbers.spec, self.s[0]
        if not spec.momentum:
            return dbar
        bbar = _plus(dbar * numbers["momentum"] if spec.nesterov else dbar, self.mu[0])
        if spec.nesterov:
            self.count("momentum", lambda: dbar * self.done.moments[0])
        if self.done.numbers.step == 0:
            self.before[0] = torch.zeros_like(bbar)
            return dbar + bbar if spec.nesterov else bbar
        if old is not None:
            self.count("momentum", lambda: bbar * old)
        self.count("dampening", lambda: -bbar * self.done.g)
        self.before[0] = bbar * numbers["momentum"]
        g = bbar * (1 - numbers["dampening"])
        return dbar + g if spec.nesterov else g
