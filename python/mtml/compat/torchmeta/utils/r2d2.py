"""Ridge regression in closed form (R2D2: Bertinetto et al., 2019, arXiv 1805.08136)."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Solution", "ridge_regression"]


class Solution(NamedTuple):
    """weight [O, D], and bias [O] or None."""

    weight: Tensor
    bias: Tensor | None


def ridge_regression(
    embeddings: Tensor,
    targets: Tensor,
    reg_lambda: float | Tensor,
    num_classes: int | None = None,
    use_woodbury: bool | None = None,
    scale: bool = True,
    bias: bool = True,
) -> Solution:
    """The linear function of least ||X W - Y||^2 + lambda ||W||^2 for one task, differentiable; the bias counts in W.

    Args:
        embeddings: X [N, D].
        targets: class ids [N], which become one-hot rows, or values [N, O].
        reg_lambda: lambda, a number or a tensor.
        num_classes: O for class ids; by default one more than the highest, with a warning.
        use_woodbury: solve the N x N system in place of the D x D one; by default the smaller.
        scale: divide X and Y by the root of N.
        bias: fit an affine function.

    Raises:
        ValueError: targets are floating point and not [N, O].

    Example:
        >>> import torch
        >>> found = ridge_regression(torch.eye(3), torch.tensor([0, 1, 1]), 0.1, num_classes=2)
        >>> tuple(found.weight.shape), tuple(found.bias.shape)
        ((2, 3), (2,))
    """
    samples, features = embeddings.shape
    y = _rows(targets, num_classes, embeddings.dtype)
    x = torch.cat([embeddings.new_ones(samples, 1), embeddings], 1) if bias else embeddings
    if scale:
        x, y = x / math.sqrt(samples), y / math.sqrt(samples)
    if use_woodbury is None:
        use_woodbury = samples <= features + bias
    gram = x @ x.mT if use_woodbury else x.mT @ x
    ridge = gram + reg_lambda * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    solved = x.mT @ torch.linalg.solve(ridge, y) if use_woodbury else torch.linalg.solve(ridge, x.mT @ y)
    return Solution(solved[1:].mT, solved[0]) if bias else Solution(solved.mT, None)


def _rows(targets: Tensor, num_classes: int | None, dtype: torch.dtype) -> Tensor:
    """[N, O]"""
    if targets.is_floating_point():
        if targets.ndim != 2:
            raise ValueError(f"targets: expected values [N, O] or class ids [N], got values {list(targets.shape)}")
        return targets
    if num_classes is None:
        warnings.warn(
            "num_classes: not given; taking one more than the highest of the targets, which is too few where a task "
            "lacks the last class",
            stacklevel=3,
        )
    return F.one_hot(targets, -1 if num_classes is None else num_classes).to(dtype)
