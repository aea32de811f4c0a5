"""Sums over tasks, over what was broadcast, and over all tensors of a task: clipping by the norm of its gradients.

c = min(1, m / (|g| + 1e-6)), and of the cotangents h of c g, where c < 1:  v = c h - m / (|g| (|g| + 1e-6)^2) <h, g> g
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, summed, wide
from mtml_kernels.schema.update import HYPERS

__all__ = ["SUMS"]

_CLIP = HYPERS.index("clip_norm")
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def _reduce(part: Part, x: Tensor) -> Results:
    return (summed(x, part.constants.shape),)


def _over_tasks(part: Part, x: Tensor) -> Results:
    return (wide(x).sum(0, keepdim=True),)


def _rate(part: Part, g: Tensor, lam: Tensor) -> Results:
    shape = part.constants.shape
    if not shape and g.shape == lam.shape:
        return (torch.dot(g.reshape(-1), lam.reshape(-1)).neg_(),)
    return (-summed(g * lam, shape),)


def _norm(gs: Sequence[Tensor | None]) -> Tensor:
    """|g|  # [T]"""
    norms = [torch.linalg.vector_norm(g, dim=(1, 2)) for g in gs if g is not None]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _clip(part: Part, hyper: Tensor, *gs: Tensor | None) -> Results:
    scale = (hyper[_CLIP] / (_norm(gs) + _CLIP_EPS)).clamp_(max=1.0)
    return scale, *(None if g is None else g * scale.view(-1, 1, 1) for g in gs)


def _unclip(part: Part, hyper: Tensor, scale: Tensor, *both: Tensor | None) -> Results:
    count = part.constants
    hs, gs = both[:count], both[count:]
    norm, inner = _norm(gs), torch.zeros_like(scale)
    for h, g in zip(hs, gs, strict=True):
        if h is not None and g is not None:
            inner = inner + (h * g).sum((1, 2))
    divisor, active = norm + _CLIP_EPS, scale != 1
    along = hyper[_CLIP] * inner / (norm * divisor.square())
    along = torch.where(active & (norm != 0), along, 0.0).view(-1, 1, 1)
    factor, dhyper = scale.view(-1, 1, 1), None
    vs = [_back(h, g, factor, along) if want else None for h, g, want in zip(hs, gs, part.wants[:-1], strict=True)]
    if part.wants[-1]:
        slope = torch.where(active, inner / divisor, 0.0).sum(dtype=hyper.dtype)
        dhyper = F.pad(slope.view(1), (_CLIP, len(HYPERS) - 1 - _CLIP))
    return *vs, dhyper


def _back(h: Tensor | None, g: Tensor | None, factor: Tensor, along: Tensor) -> Tensor | None:
    """factor h - along g"""
    scaled = None if h is None else h * factor
    if g is None:
        return scaled
    return g * -along if scaled is None else torch.addcmul(scaled, g, along, value=-1)


SUMS: dict[str, TorchKernel] = {
    "reduce": _reduce,
    "tasks.sum": _over_tasks,
    "update.rate": _rate,
    "update.clip": _clip,
    "update.unclip": _unclip,
}
