"""Meta-Curvature's transform of a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MetaCurvatureTransform"]


class MetaCurvatureTransform(nn.Module):
    """lr * G, multiplied along each of its dimensions by a learned matrix, the identity at first.

    Args:
        param: a bias [O], scaled by ``mc`` [O]; a matrix [O, I], by ``mc_in`` [O, O] and ``mc_out`` [I, I]; or the
            weight [O, I, kh, kw] of a convolution, by ``mc_f`` [kh kw, kh kw] too.
        lr: a constant factor.

    Raises:
        NotImplementedError: a parameter of another shape.

    Paper: Park, Oliva, "Meta-Curvature", 2019 (arXiv:1902.03356).
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        shape = param.shape
        self.dim = len(shape)
        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        elif self.dim in (2, 4):
            self.mc_in = nn.Parameter(_identity(shape[0], param))
            self.mc_out = nn.Parameter(_identity(shape[1], param))
            if self.dim == 4:
                self.mc_f = nn.Parameter(_identity(math.prod(shape[2:]), param))
        else:
            raise NotImplementedError(
                f"param: expected one of 1, 2 or 4 dimensions, got {list(shape)}; give it another transform in a "
                "TransformDictionary"
            )

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            update = self.mc * grad
        elif self.dim == 2:
            update = self.mc_in @ grad @ self.mc_out
        else:
            flat = grad.reshape(*grad.shape[:2], -1)  # [O, I, f]
            update = torch.einsum("ao,oif,ib,cf->abc", self.mc_in, flat, self.mc_out, self.mc_f).reshape(grad.shape)
        return self.lr * update


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
