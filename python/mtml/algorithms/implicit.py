"""Differentiating the solution of a problem in place of the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Implicit", "conjugate_gradients"]

ONCE = (
    "iMAML's meta-gradient is differentiable once, and was differentiated again. Way out: "
    'mtml.MAML(..., backend="general"), which is differentiable any number of times.'
)


class Implicit(torch.autograd.Function):
    """`Implicit.apply(solve, *values, *moved)` is `values`, with gradients through `moved`.

    At a solution phi of phi = F(phi, a), `moved` is F(phi, a) as a function of a alone; solve(cotangents of phi) is
    (I - dF/dphi)^-T of them, and the cotangents of `moved`.
    """

    @staticmethod
    def forward(ctx: Any, solve: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        return tuple(t.clone() for t in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(ONCE)
        return None, *(None for _ in cotangents), *ctx.solve(cotangents)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with matrix(x) = b for every row by itself, [T, P], in `steps` products, one for all rows each.

    matrix: symmetric, [T, P] -> [T, P]. A row whose residual has become that of rounding stays as it is: further steps
    would divide roundings by each other, up to infinity.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    square = b.square().sum(1, keepdim=True)
    least = square * torch.finfo(b.dtype).eps ** 2
    for _ in range(steps):
        product = matrix(direction)
        curvature = (direction * product).sum(1, keepdim=True)
        step = _ratio(square, curvature, square <= least)
        x, residual = x + step * direction, residual - step * product
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(square, before, before <= least) * direction
    return x


def _ratio(a: Tensor, b: Tensor, solved: Tensor) -> Tensor:
    """a / b, and 0 where the row is solved."""
    return torch.where(solved, torch.zeros_like(a), a / torch.where(solved, torch.ones_like(b), b))
