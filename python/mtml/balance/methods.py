"""Gradient methods in Gram space: from G [H, H] = <g_i, g_j> to weights w [H] of the update sum_h w_h g_h.

    PCGrad       g_i <- g_i - min(0, <g_i, g_j>) / |g_j|^2 g_j  for the other j in random order;  the sum over i
    MGDA         min |sum w_h g_h|,  w >= 0,  sum w = 1
    CAGrad       max_d min_i <g_i, d>,  |d - g_0| <= c |g_0|,  g_0 the mean
    IMTL-G       <d, g_i> / |g_i| the same for all i,  sum w = 1:  w ~ G^+ n,  n_i = |g_i|
    UPGrad       the mean over i of the projection of g_i on {d: <d, g_j> >= 0 for all j}
    DualProj     the projection of the mean on {d: <d, g_j> >= 0 for all j}
    ConFIG       d ~ U^+ 1,  rows of U g_i / |g_i|:  <d, g_i> / |g_i| the same for all i;  |d| = sum_i <g_i, d> / |d|
    Aligned-MTL  w = B p,  B = sqrt(l_min) V L^(-1/2) V',  G = V L V' over its rank
    Nash, FairGrad  G w = w^(-1 / alpha),  w > 0,  alpha = 1 for Nash: see `mtml.balance.fair`

All but the last two are scale-free: c G gives the same weights; there they are c^(-alpha / (1 + alpha)) times as large.
Every function takes G in float64, H >= 1, and no gradient that is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtml.balance.fair import fairgrad, nash
from mtml.balance.programs import above, min_norm, optimiser, root
from mtml_kernels.checks import check_number

__all__ = ["METHODS", "Array", "aligned_mtl", "cagrad", "config", "dualproj", "imtl_g", "mgda", "pcgrad", "upgrad"]

Array = npt.NDArray[np.float64]


def pcgrad(gram: Array, *, generator: torch.Generator | None = None) -> Array:
    """Conflicting gradients lose the part that conflicts, one after another in random order; their sum.

    Args:
        generator: draws the orders; None for PyTorch's own.

    Paper: Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", 2020 (arXiv:2001.06782).
    """
    n = len(gram)
    rows = np.eye(n)  # row i: the i-th gradient's coefficients over the original ones
    for i, row in enumerate(rows):
        for j in torch.randperm(n, generator=generator).tolist():
            product = row @ gram[:, j]
            if j != i and product < 0:
                row[j] -= product / gram[j, j]
    weights: Array = rows.sum(0)
    return weights


def mgda(gram: Array) -> Array:
    """The shortest convex combination of the gradients; all losses fall along it, or it is 0 where none can.

    Papers: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012; Sener, Koltun,
    "Multi-Task Learning as Multi-Objective Optimization", 2018 (arXiv:1810.04650; at the features: its MGDA-UB).
    """
    return min_norm(gram)


def cagrad(gram: Array, *, c: float = 0.4) -> Array:
    """The direction near the mean gradient whose worst loss falls most.

    By duality d = g_0 + c |g_0| g_w / |g_w| for the w in the simplex of least <g_w, g_0> + c |g_0| |g_w|.

    Args:
        c: the radius around the mean gradient, in [0, 1): 0 is the mean itself, towards 1 comes near MGDA.

    Raises:
        ValueError: c outside [0, 1).

    Paper: Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", 2021
    (arXiv:2110.14048).
    """
    c = check_number("c", c, least=0, below=1)
    n = len(gram)
    gram = gram / np.trace(gram) * n
    mean = np.full(n, 1 / n)
    linear, radius = gram @ mean, c * _length(gram, mean)

    def objective(w: Array) -> tuple[float, Array]:
        product = gram @ w
        length = max(_length(gram, w), 1e-10)
        return w @ linear + radius * length, linear + radius * product / length

    def solve(start: Array) -> Any:
        simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
        options = {"ftol": 1e-14, "maxiter": 1000}
        return optimiser().minimize(
            objective, start, jac=True, bounds=[(0, 1)] * n, constraints=simplex, method="SLSQP", options=options
        )

    # convex, yet not smooth where the combination vanishes: the better of two starts
    found = min((solve(start) for start in (mean, min_norm(gram))), key=lambda result: result.fun)
    w: Array = found.x.clip(min=0)
    w /= w.sum()
    weights: Array = mean + radius / max(_length(gram, w), 1e-10) * w
    return weights


def imtl_g(gram: Array) -> Array:
    """The combination with the same projection on every gradient's direction; 0 where there is none of sum 1.

    Paper: Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-task Learning", 2021 (ICLR).
    """
    lengths = np.sqrt(np.diagonal(gram))
    raw = np.linalg.pinv(gram, hermitian=True) @ lengths
    total = raw.sum()
    return raw / total if abs(total) > 1e-12 * np.abs(raw).sum() else np.zeros_like(raw)


def upgrad(gram: Array) -> Array:
    """The mean of the gradients, each projected so that it conflicts with no gradient; no loss rises along it.

    Paper: Quinton, Rey, "Jacobian Descent for Multi-Objective Optimization", 2024 (arXiv:2406.16232).
    """
    n = len(gram)
    factor = root(gram / np.trace(gram) * n)
    weights: Array = np.mean([above(factor, unit) for unit in np.eye(n)], axis=0)
    return weights


def dualproj(gram: Array) -> Array:
    """The mean of the gradients, projected so that it conflicts with no gradient; no loss rises along it.

    Paper: Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning", 2017 (arXiv:1706.08840), whose
    projection this is, there of the newest task's gradient.
    """
    n = len(gram)
    return above(root(gram / np.trace(gram) * n), np.full(n, 1 / n))


def config(gram: Array) -> Array:
    """ConFIG: along the direction that has one angle with all gradients, as far as they reach along it together.

    0 where the least squares for that direction have none, as for opposite gradients.

    Paper: Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", 2024
    (arXiv:2408.11104).
    """
    lengths = np.sqrt(np.diagonal(gram))
    cosines = gram / np.outer(lengths, lengths)
    raw = np.linalg.pinv(cosines, rcond=len(gram) * np.finfo(np.float32).eps, hermitian=True).sum(1)
    square = raw.sum()  # of the direction's length, for raw' C raw = 1' C^+ C C^+ 1
    if square <= 1e-12:
        return np.zeros_like(raw)
    weights: Array = (lengths @ cosines @ raw) / square * raw / lengths
    return weights


def aligned_mtl(gram: Array) -> Array:
    """The mean of the gradients after their principal components have been brought to the length of the smallest.

    Paper: Senushkin, Patakin, Kuznetsov, Konushin, "Independent Component Alignment for Multi-Task Learning", 2023
    (arXiv:2305.19000).
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * len(gram) * np.finfo(np.float32).eps  # the gradients' own precision
    values, vectors = values[kept], vectors[:, kept]
    mean = np.full(len(gram), 1 / len(gram))
    weights: Array = np.sqrt(values[0]) * (vectors / np.sqrt(values)) @ (vectors.T @ mean)
    return weights


def _length(gram: Array, weights: Array) -> float:
    """|sum_h w_h g_h|."""
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))


METHODS: dict[str, Callable[..., Array]] = {
    "aligned_mtl": aligned_mtl,
    "cagrad": cagrad,
    "config": config,
    "dualproj": dualproj,
    "fairgrad": fairgrad,
    "imtl_g": imtl_g,
    "mgda": mgda,
    "nash": nash,
    "pcgrad": pcgrad,
    "upgrad": upgrad,
}
