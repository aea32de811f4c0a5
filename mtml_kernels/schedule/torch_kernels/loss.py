"""The loss of a task, sum_n c_n l_n: the kernels of `loss_terms`, and the weights c of samples.

w_n = mask_n counts_n      c = w / sum w, 0 where that is 0, or w for a sum of losses      counts: the id is not ignored
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Loss
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, like, wide
from mtml_kernels.schedule.torch_kernels.loss_terms import Terms, terms
from mtml_kernels.schema.losses import IGNORED

__all__ = ["LOSS"]


def _forward(part: Part, z: Tensor, target: Tensor, c: Tensor | None) -> Results:
    each, d = part.wants
    given: Loss = part.constants
    loss = terms(given, z, target)
    return (
        _of_samples(given, loss, loss.value()) if each else None,
        like(_weighed(given, loss, c, loss.slope()), z).view(-1, *z.shape[1:]) if d else None,
    )


def _tangent(
    part: Part, z: Tensor, zt: Tensor | None, target: Tensor, c: Tensor | None, seed: Tensor | None
) -> Results:  # fmt: skip
    given: Loss = part.constants
    loss = terms(given, z, target)
    bend = None if zt is None else loss.bend(wide(zt).flatten(2))
    dt = _plus_seeded(bend, seed, loss.slope)
    dt = torch.zeros_like(loss.z) if dt is None else _weighed(given, loss, c, dt)
    return (like(dt, z).view(-1, *z.shape[1:]),)


def _data(
    part: Part, z: Tensor, zt: Tensor | None, target: Tensor, c: Tensor | None, seed: Tensor | None
) -> Results:  # fmt: skip
    dtarget, dc = part.wants
    given: Loss = part.constants
    loss = terms(given, z, target)
    moved = None if zt is None else wide(zt).flatten(2)
    grad = each = None
    if dtarget:
        bend = None if moved is None else loss.target_bend(moved)
        grad = _plus_seeded(bend, seed, loss.target_slope)
        grad = torch.zeros_like(loss.z) if grad is None else _weighed(given, loss, c, grad)
        grad = like(grad, target).reshape(-1, *target.shape[1:])
    if dc:
        along = None if moved is None else _of_samples(given, loss, loss.slope() * moved)
        each = _plus_seeded(along, seed, lambda: _of_samples(given, loss, loss.value()))
    return grad, each


def _sum(part: Part, each: Tensor, c: Tensor | None) -> Results:
    if c is not None:
        return ((each * c).sum(1),)
    return (each.sum(1) if part.constants.total else each.mean(1),)


def _weights(part: Part, mask: Tensor | None, target: Tensor | None) -> Results:
    given: Loss = part.constants
    counts = _counts(target)
    if mask is None:
        assert counts is not None
        w = counts.to(given.dtype)
    else:
        w = wide(mask) if counts is None else wide(mask) * counts
    total = w.sum(1)
    if given.total:
        return w, total
    return w.div(total.unsqueeze(1)).masked_fill_((total == 0).unsqueeze(1), 0.0), total


def _weights_backward(
    part: Part, dc: Tensor, c: Tensor | None, total: Tensor | None, target: Tensor | None
) -> Results:  # fmt: skip
    counts = _counts(target)
    if not part.constants.total:
        assert c is not None and total is not None
        dc = (dc - (c * dc).sum(1, keepdim=True)) / total.unsqueeze(1)
        dc = dc.masked_fill_((total == 0).unsqueeze(1), 0.0)
    return (dc if counts is None else dc.masked_fill(~counts, 0.0),)


LOSS: dict[str, TorchKernel] = {
    "loss.forward": _forward,
    "loss.tangent": _tangent,
    "loss.data": _data,
    "loss.sum": _sum,
    "weights.forward": _weights,
    "weights.backward": _weights_backward,
}


def _counts(target: Tensor | None) -> Tensor | None:
    """Which samples of class ids count  # [T, N]"""
    return None if target is None or target.is_floating_point() else (target != IGNORED).flatten(1)


def _of_samples(given: Loss, loss: Terms, elements: Tensor) -> Tensor:
    """Of every sample the mean over its elements, or their sum  # [T, N]"""
    if elements.shape[2] == 1:
        return elements.squeeze(2)
    total = elements.sum(2)
    return total if given.total or loss.size == 1 else total.div_(loss.size)


def _weighed(given: Loss, loss: Terms, c: Tensor | None, x: Tensor) -> Tensor:
    """x, which is a derivative of the elements' losses, times what an element counts for in the task's, in place."""
    size = 1 if given.total else loss.size
    if c is None:
        count = 1 if given.total else size * x.shape[1]
        return x if count == 1 else x.mul_(1 / count)
    c = c.to(x.dtype).unsqueeze(2)
    return x.mul_(c if size == 1 else c / size)


def _plus_seeded(x: Tensor | None, seed: Tensor | None, value: Callable[[], Tensor]) -> Tensor | None:
    """x + seed value(), of which either may be absent; value() is new."""
    if seed is None:
        return x
    own = value()
    factor = seed.to(own.dtype).view(-1, *[1] * (own.ndim - 1))
    return own.mul_(factor) if x is None else torch.addcmul(x, own, factor)
