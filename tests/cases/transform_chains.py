"""Chains of differentiations and vmaps over a function of a vector to the losses of several heads.

Every head looks at its own part of the vector, so that each link of a chain makes a function of the same kind: from the
vector [n] to one number a head [H]. The oracle is the same chain over a formula of PyTorch operations.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]  # [n] -> [H]
Link = Callable[[Losses, Sequence[int]], Losses]  # the second: the length of every head's part


def _along(n: int, seed: int) -> Tensor:
    """A direction; no random numbers, which vmap would not make."""
    return torch.cos(0.7 * seed * torch.arange(1, n + 1, dtype=torch.float64) + seed)


def _parts(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum of every head's part."""
    return torch.stack([part.sum() for part in values.split(list(sizes))])


def grad(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: _parts(torch.func.grad(lambda a: f(a).sum())(z) * _along(len(z), 1), sizes)


def vjp(f: Losses, sizes: Sequence[int]) -> Losses:
    def found(z: Tensor) -> Tensor:
        losses, pull = torch.func.vjp(f, z)
        return _parts(pull(losses.sin())[0] * _along(len(z), 2), sizes)

    return found


def jvp(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: torch.func.jvp(f, (z,), (_along(len(z), 3),))[1]


def _plane(f: Losses, z: Tensor) -> Losses:
    """f on a plane through z: Jacobians of two columns."""
    return lambda s: f(z + s[0] * _along(len(z), 4) + s[1] * _along(len(z), 5))


def _origin() -> Tensor:
    return torch.zeros(2, dtype=torch.float64)


def jacrev(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: torch.func.jacrev(_plane(f, z))(_origin()) @ _along(2, 6)


def jacfwd(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: torch.func.jacfwd(_plane(f, z))(_origin()) @ _along(2, 7)


def hessian(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: (torch.func.hessian(_plane(f, z))(_origin()) * _along(4, 8).view(2, 2)).sum((1, 2))


def vmap(f: Losses, sizes: Sequence[int]) -> Losses:
    return lambda z: torch.func.vmap(f)(torch.stack([z, 0.5 * z])).sum(0)


LINKS: dict[str, Link] = {f.__name__: f for f in (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap)}


BASIC = ("grad", "jvp", "vmap")


def chains(extra: int) -> list[str]:
    """All chains of one and two links, all of three of `BASIC`, and some of the other ones of three.

    All 399 passed once; a second Hessian in a chain takes a second and shows nothing that a jvp of a Hessian does not.
    """
    short = [c for n in (1, 2) for c in itertools.product(LINKS, repeat=n)]
    basic = list(itertools.product(BASIC, repeat=3))
    rest = [c for c in itertools.product(LINKS, repeat=3) if c not in basic]
    found = short + basic + random.Random(0).sample(rest, extra)
    return ["-".join(c) for c in found if c.count("hessian") < 2]


def basic_chains() -> list[str]:
    """Chains of two of `BASIC`, and those of three with a jvp around or within another."""
    long = ["jvp-grad-jvp", "jvp-jvp-jvp", "jvp-vmap-grad", "grad-jvp-grad", "vmap-jvp-jvp"]
    return ["-".join(c) for c in itertools.product(BASIC, repeat=2)] + long


def chained(names: str, f: Losses, sizes: Sequence[int]) -> Losses:
    """The links around f, the last one innermost."""
    for name in reversed(names.split("-") if names else []):
        f = LINKS[name](f, sizes)
    return f
