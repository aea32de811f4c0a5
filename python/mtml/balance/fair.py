"""Weights that share out what the losses gain: Nash-MTL and FairGrad, the w > 0 with  G w = w^(-p),  elementwise.

w is where w'Gw / 2 - sum_h f(w_h), f' = w^(-p), is least: strictly convex, so there is one, found by Newton's method.
With w_h = v_h G_hh^(-1 / (1 + p)) the cosines C stand in for G, and lengths of any size do no harm:
    M v = q v^(-p),  q_h = G_hh^((p - 1) / (p + 1)),  M = q^(1/2) C q^(1/2)
Where gradients cancel, that is G w = 0 for some w >= 0, no loss can fall unless another one rises, and there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["fairgrad", "nash"]

STEPS = 500  # 5 to 100 are usual
NONE = 1e10  # where gradients cancel v grows without end; v^(1 + p) stays far below where they do not, see _cosines


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
    if not 0.5 <= alpha <= 10:
        raise ValueError(f"alpha: expected in [0.5, 10], got {alpha}")
    return _fair_weights(gram, 1 / alpha)


def _fair_weights(gram: Array, p: float) -> Array:
    """The w > 0 [H] with gram @ w = w ** -p; 0 where there is none.

    Raises:
        RuntimeError: not found in many steps.
    """
    squares = np.diagonal(gram)
    scale = np.exp((p - 1) / (p + 1) * np.log(squares / squares.max()))
    matrix = _cosines(gram) * np.sqrt(np.outer(scale, scale))
    v = np.ones(len(gram))
    for _ in range(STEPS):
        pull = scale * v**-p
        slope = matrix @ v - pull
        if v.max() ** (1 + p) > NONE:
            return np.zeros_like(v)
        if (np.abs(slope) <= 1e-13 * (np.abs(matrix) @ v + pull)).all():
            weights: Array = v * squares ** (-1 / (1 + p))
            return weights
        v = v + _step(matrix, scale, v, p, slope)
    raise RuntimeError(f"method: expected weights within {STEPS} steps, got none for the Gram matrix {gram.tolist()}")


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
    """C [H, H] without what is below the gradients' own precision, for that may be below 0 and have no least value."""
    lengths = np.sqrt(np.diagonal(gram))
    values, vectors = np.linalg.eigh(gram / np.outer(lengths, lengths))
    values = np.where(values > len(gram) * np.finfo(np.float32).eps, values, 0)
    cosines: Array = (vectors * values) @ vectors.T
    return cosines
