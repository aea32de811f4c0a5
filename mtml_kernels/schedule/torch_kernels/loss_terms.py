"""Losses of the inner loop, one row of elements [T, N, E] a sample: value, and derivatives in z and in the target y.

      l                              dl/dz               d2l zt                  dl/dy            d2l/dydz zt
    mse  (z - y)^2                   2 (z - y)           2 zt                    -dl/dz           -d2l zt
    bce  log(1 + e^z) - z y          s - y               s (1 - s) zt            -z               -zt
    huber  h(z - y)                  clamp(z - y, p0)    [|z - y| < p0] zt       -dl/dz           -d2l zt
    l1   |z - y|                     sign(z - y)         0                       -dl/dz           0
    ce   -<t, log p>                 m p - t             m p (zt - <p, zt>)     (p0 - 1) log p   (1 - p0) (<p, zt> - zt)

with s = sigmoid(z), p = softmax(z), t = (1 - p0) y + p0 / C for y one-hot of class ids or probabilities, m = sum t.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.schedule.kernels import Loss
from mtml_kernels.schedule.torch_kernels.common import tasks_of, wide
from mtml_kernels.schema.losses import KINDS, SOFT

__all__ = ["Terms", "terms"]


class Terms:
    """What a loss is made of. `size`: over how many elements of a sample its mean is taken."""

    def __init__(self, z: Tensor, y: Tensor, p0: float) -> None:
        self.z, self.y, self.p0, self.size = z, y, p0, z.shape[2]

    def value(self) -> Tensor:
        """l  # [T, N, E], or [T, N, 1] of classes"""
        raise NotImplementedError

    def slope(self) -> Tensor:
        """dl/dz  # [T, N, E]"""
        raise NotImplementedError

    def bend(self, zt: Tensor) -> Tensor | None:
        """d2l zt  # [T, N, E]; None for 0"""
        raise NotImplementedError

    def target_slope(self) -> Tensor:
        """dl/dy  # [T, N, E]"""
        return self.slope().neg()

    def target_bend(self, zt: Tensor) -> Tensor | None:
        """d2l/dydz zt  # [T, N, E]; None for 0"""
        bend = self.bend(zt)
        return None if bend is None else bend.neg()


class _Mse(Terms):
    def value(self) -> Tensor:
        return (self.z - self.y).square_()

    def slope(self) -> Tensor:
        return (self.z - self.y).mul_(2)

    def bend(self, zt: Tensor) -> Tensor:
        return zt * 2


class _Bce(Terms):
    def value(self) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.z, self.y, reduction="none")

    def slope(self) -> Tensor:
        return self.z.sigmoid() - self.y

    def bend(self, zt: Tensor) -> Tensor:
        s: Tensor = torch.ops.aten.sigmoid_backward(zt, self.z.sigmoid())
        return s

    def target_slope(self) -> Tensor:
        return self.z.neg()

    def target_bend(self, zt: Tensor) -> Tensor:
        return zt.neg()


class _Huber(Terms):
    def value(self) -> Tensor:
        return F.huber_loss(self.z, self.y, reduction="none", delta=self.p0)

    def slope(self) -> Tensor:
        return (self.z - self.y).clamp_(-self.p0, self.p0)

    def bend(self, zt: Tensor) -> Tensor:
        return torch.where((self.z - self.y).abs_() < self.p0, zt, 0.0)


class _L1(Terms):
    def value(self) -> Tensor:
        return (self.z - self.y).abs_()

    def slope(self) -> Tensor:
        return (self.z - self.y).sign_()

    def bend(self, zt: Tensor) -> None:
        return None


class _Soft(Terms):
    """Cross-entropy with probabilities."""

    def __init__(self, z: Tensor, y: Tensor, p0: float) -> None:
        super().__init__(z, y, p0)
        self.size = 1

    @functools.cached_property
    def log_p(self) -> Tensor:
        return self.z.log_softmax(2)

    @functools.cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @functools.cached_property
    def t(self) -> Tensor:
        """[T, N, C]"""
        return self.y if self.p0 == 0 else self.y * (1 - self.p0) + self.p0 / self.z.shape[2]

    def value(self) -> Tensor:
        return (self.t * self.log_p).sum(2, keepdim=True).neg_()

    def slope(self) -> Tensor:
        return torch.addcmul(self.t.neg(), self.p, self.t.sum(2, keepdim=True))

    def bend(self, zt: Tensor) -> Tensor:
        return self._along(zt) * self.t.sum(2, keepdim=True)

    def _along(self, zt: Tensor) -> Tensor:
        """p (zt - <p, zt>)"""
        zt, p = torch.broadcast_tensors(zt, self.p)
        moved: Tensor = torch.ops.aten._softmax_backward_data(zt, p, 2, p.dtype)
        return moved

    def target_slope(self) -> Tensor:
        return self.log_p * (self.p0 - 1)

    def target_bend(self, zt: Tensor) -> Tensor:
        return ((self.p * zt).sum(2, keepdim=True) - zt).mul_(1 - self.p0)


class _Ids(_Soft):
    """Cross-entropy with class ids y [T, N, 1]; an ignored one, whose sample has the weight 0, counts as class 0."""

    def __init__(self, z: Tensor, y: Tensor, p0: float) -> None:
        super().__init__(z, y.long().clamp(min=0), p0)

    def value(self) -> Tensor:
        hit = self.log_p.gather(2, self.y)
        if self.p0 == 0:
            return hit.neg_()
        return hit.mul_(self.p0 - 1).sub_(self.log_p.mean(2, keepdim=True), alpha=self.p0)

    def slope(self) -> Tensor:
        smooth = self.p - self.p0 / self.z.shape[2] if self.p0 else self.p.clone()
        return smooth.scatter_add_(2, self.y, smooth.new_full((), self.p0 - 1).expand(self.y.shape))

    def bend(self, zt: Tensor) -> Tensor:
        return self._along(zt)


_TERMS: dict[int, type[Terms]] = {
    KINDS.index("mse"): _Mse,
    KINDS.index("cross_entropy"): _Ids,
    KINDS.index("bce_with_logits"): _Bce,
    KINDS.index("huber"): _Huber,
    KINDS.index("l1"): _L1,
    SOFT: _Soft,
}


def terms(given: Loss, z: Tensor, target: Tensor) -> Terms:
    """Of z [T, N, R, F] and a target [T, N, ...] with as many elements, or with one class id, a sample."""
    z, kind = wide(z).flatten(2), _TERMS[given.kind]
    y = target.reshape(*target.shape[:2], 1 if kind is _Ids else z.shape[2])
    if kind is not _Ids:
        y = y.to(z.dtype)
    tasks = tasks_of(z, y)
    if z.shape[0] != tasks or y.shape[0] != tasks:
        z, y = (t.expand(tasks, -1, -1) for t in (z, y))
    return kind(z, y, given.p0)
