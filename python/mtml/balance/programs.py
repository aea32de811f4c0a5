"""Small quadratic programs over a Gram matrix, as non-negative least squares.

With G = R'R:
    above      min v'Gv, v >= l            v = l + u, u >= 0:  |R u + R l|^2
    min_norm   min a'Ga, a >= 0, sum a = 1 a = u / sum u, u >= 0:  |R u|^2 + (sum u - 1)^2
The second is Lawson and Hanson's least distance programming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mtml.balance.methods import Array

__all__ = ["above", "min_norm", "optimiser", "root"]


def optimiser() -> Any:
    """scipy.optimize; ImportError with the way out where there is no scipy."""
    try:
        import scipy.optimize
    except ImportError as error:
        raise ImportError(
            "method: this one solves its programs with scipy; pip install 'mtml-kernels[balance]'"
        ) from error
    return scipy.optimize


def root(gram: Array) -> Array:
    """R [H, H] with R'R = gram; rounding may have left eigenvalues a little below 0, which count as 0."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(values.clip(min=0))[:, None] * vectors.T


def above(factor: Array, lower: Array) -> Array:
    """The v >= lower [H] of least |factor v|."""
    return lower + _nnls(factor, -factor @ lower)


def min_norm(gram: Array) -> Array:
    """The weights [H], at least 0 and of sum 1, of the shortest vector in the gradients' convex hull."""
    n = len(gram)
    factor = root(gram / np.trace(gram) * n)
    u = _nnls(np.vstack([factor, np.ones(n)]), np.concatenate([np.zeros(n), [1.0]]))
    return u / u.sum()


def _nnls(factor: Array, target: Array) -> Array:
    solution: Array = optimiser().nnls(factor, target, maxiter=100 * factor.shape[1])[0]
    return solution
