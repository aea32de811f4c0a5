"""Weights that share out what the losses gain: Nash-MTL and FairGrad, the w > 0 with  G w = w^(-p),  elementwise.

w is where w'Gw / 2 - sum_h f(w_h), f' = w^(-p), is least: strictly convex, so there is one, found by Newton's method.
With w_h = v_h G_hh^(-1 / (1 + p)) the cosines C stand in for G, and lengths of any size do no harm:
    M v = q v^(-p),  q_h = G_hh^((p - 1) / (p + 1)),  M = q^(1/2) C q^(1/2)
Where gradients cancel, that is G w = 0 for some w >= 0, no loss can fall unless another one rises, and there is none;
taken to be so where some weighted sum of the unit gradients is shorter than a thousandth of its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mtml.balance.programs import root
from mtml_kernels.checks import check_number

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["fairgrad", "nash"]

STEPS = 500  # 5 to 100 are usual
# |sum_h u_h g_h / |g_h||^2 / |u|^2, below which gradients cancel: ten times what products in float32 are off by, for
# then u is a matter of rounding
CANCEL = 1e-6


def nash(gram: Array) -> Array:
    """The gradients' Nash bargain: losses fall in proportion to what the others leave them, G w = 1 / w.

    The update has length sqrt(H) whatever the gradients' lengths are. 0 where gradients cancel.

    Paper: Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya, "Multi-Task Learning as a Bargaining Game",
    2022 (arXiv:2202.01017).
    """
    return _fair_weights(gram, 1.0)


def fairgrad(gram: Array, *, alpha: float = 2.0) -> Array:
    """The alpha-fair update: G w = w^(-1 / alpha). 0 where gradients cancel.

    Args:
        alpha: in [0.5, 10]. 1 is `nash`; larger ones care more for the loss that falls least.

    Raises:
        ValueError: alpha outside [0.5, 10].

    Paper: Ban, Ji, "Fair Resource Allocation in Multi-Task Learning", 2024 (arXiv:2402.15638).
    """
    return _fair_weights(gram, 1 / check_number("alpha", alpha, least=0.5, most=10))


def _fair_weights(gram: Array, p: float) -> Array:
    """The w > 0 [H] with gram @ w = w ** -p; 0 where there is none.

    Raises:
        RuntimeError: not found in many steps, which takes lengths of eight orders of magnitude and alpha far from 1.
    """
    squares = np.diagonal(gram)
    scale = np.exp((p - 1) / (p + 1) * np.log(squares / squares.max()))
    halves = np.sqrt(scale)
    matrix = _cosines(gram) * np.outer(halves, halves)
    v = np.ones(len(gram))
    for _ in range(STEPS):
        pull = scale * v**-p
        slope = matrix @ v - pull
        if v @ matrix @ v <= CANCEL * (scale * v) @ v:  # v grows without end where that comes to 0
            return np.zeros_like(v)
        if (np.abs(slope) <= 1e-13 * (np.abs(matrix) @ v + pull)).all():
            weights: Array = v * squares ** (-1 / (1 + p))
            return weights
        v = v + _step(matrix, scale, v, p, slope)
    raise RuntimeError(
        f"alpha: expected one that gradients of these lengths have weights for, got {1 / p:g} and lengths from "
        f"{np.sqrt(squares.min()):.3g} to {np.sqrt(squares.max()):.3g}; choose one nearer to 1"
    )


def _step(matrix: Array, scale: Array, v: Array, p: float, slope: Array) -> Array:
    """Newton's step, shortened so that v stays above 0 and does not run far past the least value on its line."""
    curvature = matrix + np.diag(p * scale * v ** (-p - 1))
    lengths = np.sqrt(np.diagonal(curvature))
    step = -np.linalg.solve(curvature / np.outer(lengths, lengths), slope / lengths) / lengths
    down = step < 0
    if down.any():
        step = step * min(1.0, 0.9 * (v[down] / -step[down]).min())
    rise = -0.5 * (slope @ step)
    # along a line the slope grows: one that is far above 0 was last 0 long before. Rounding is let off
    while step @ (matrix @ (v + step) - scale * (v + step) ** -p) > rise and np.abs(step / v).max() > 1e-12:
        step, rise = step / 2, rise / 2
    return step


def _cosines(gram: Array) -> Array:
    """C [H, H]; eigenvalues that rounding has left a little below 0 count as 0, for else nothing would be least."""
    lengths = np.sqrt(np.diagonal(gram))
    factor = root(gram / np.outer(lengths, lengths))
    cosines: Array = factor.T @ factor
    return cosines
