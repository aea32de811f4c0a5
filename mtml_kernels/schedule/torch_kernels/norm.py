"""Normalisations, by their statistics: m is the mean over what the kind normalises together (`_mean`).

    xhat = (x - mean) rstd      y = w xhat + b        e = w d      u1 = m e      u2 = m (e xhat)
    dx = rstd (e - u1 - xhat u2)

With RMS and UNIT mean, u1 and mt are absent; UNIT's m is the sum, and 0 where the length is below eps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Normalisation
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, like, tasks_of, wide

__all__ = ["NORM"]

_MEANLESS = (Norm.RMS, Norm.UNIT)


def _stats(part: Part, x: Tensor) -> Results:
    given: Normalisation = part.constants
    if given.kind in _MEANLESS:
        return None, _meanless_rstd(given, x)
    x = wide(x)
    if given.kind == Norm.GROUP:
        variance, mean = torch.var_mean(x.unflatten(3, (given.groups, -1)), (2, 4), correction=0)
        variance, mean = variance.unsqueeze(2), mean.unsqueeze(2)
    elif given.kind == Norm.BATCH and x.device.type == "cpu":
        variance, mean = _moments_in_turn(x)
    else:
        over = (1, 2) if given.kind == Norm.BATCH else (3,)
        variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    return mean if part.wants[0] else None, variance.add_(given.eps).rsqrt_()


def _moments_in_turn(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each task's batch  # [T, 1, 1, F]

    In two passes over a task, which mostly fits into a cache: 17 ms of 32 [14700, 64] where var_mean takes 99, on two
    cores.
    """
    moments = x.new_empty((2, x.shape[0], 1, 1, x.shape[3]))
    for own, variance, mean in zip(x, *moments, strict=True):
        torch.mean(own, (0, 1), keepdim=True, out=mean)
        torch.mean((own - mean).square_(), (0, 1), keepdim=True, out=variance)
    return moments[0], moments[1]


def _meanless_rstd(given: Normalisation, x: Tensor) -> Tensor:
    squares = wide(x).square()
    if given.kind == Norm.UNIT:
        return squares.sum(3, keepdim=True).sqrt_().clamp_(min=given.eps).reciprocal_()
    eps = given.eps if given.eps >= 0 else torch.finfo(x.dtype).eps
    return squares.mean(3, keepdim=True).add_(eps).rsqrt_()


def _sums(part: Part, d: Tensor, xhat: Tensor, rstd: Tensor | None, w: Tensor | None) -> Results:
    u1, u2, dw, db = part.wants
    given: Normalisation = part.constants
    d = wide(d)
    first = _reduced(given, d, w, rstd, u1, db)
    second = _reduced(given, d * xhat, w, rstd, u2, dw) if u2 or dw else (None, None)
    return first[0], second[0], second[1], first[1]


def _stats_tangent(part: Part, xt: Tensor, xhat: Tensor, rstd: Tensor | None) -> Results:
    mt, q = part.wants
    given: Normalisation = part.constants
    xt = wide(xt)
    return _mean(given, xt, rstd) if mt else None, _mean(given, xt * xhat, rstd) if q else None


def _sums_tangent(
    part: Part, d: Tensor | None, dt: Tensor | None, xhat: Tensor, xhat_t: Tensor | None,
    rstd: Tensor | None, w: Tensor | None, wt: Tensor | None,
) -> Results:  # fmt: skip
    u1t, u2t, dwt, dbt = part.wants
    given: Normalisation = part.constants
    d, dt = (None if t is None else wide(t) for t in (d, dt))
    mean_t, sum_t = _reduced(given, dt, w, rstd, u1t, dbt)
    moved = _plus(_times(dt, xhat), _times(d, xhat_t)) if u2t or dwt else None
    mean_moved, sum_moved = _reduced(given, moved, w, rstd, u2t, dwt)
    if wt is not None and d is not None:
        mean_t = _plus(mean_t, _reduced(given, d, wt, rstd, u1t, False)[0])
        mean_moved = _plus(mean_moved, _reduced(given, d * xhat, wt, rstd, u2t, False)[0])
    return mean_t, mean_moved, sum_moved, sum_t


def _apply(
    part: Part, x: Tensor, mean: Tensor | None, rstd: Tensor, w: Tensor | None, b: Tensor | None
) -> Results:  # fmt: skip
    given: Normalisation = part.constants
    rstd = _spread(given, rstd, x)
    xhat = x * rstd if mean is None else (x - _spread(given, mean, x)).mul_(rstd)
    y = None
    if part.wants[1]:
        shift = None if b is None else _row(given, b)
        y = _plus(xhat, shift) if w is None else _plus_product(shift, xhat, _row(given, w))
    return like(xhat, x), None if y is None else like(y, x)


def _back(
    part: Part, d: Tensor, xhat: Tensor, rstd: Tensor, u1: Tensor | None, u2: Tensor | None, w: Tensor | None
) -> Results:
    given: Normalisation = part.constants
    inner, spread = _centred(given, _scaled(given, wide(d), w), xhat, u1, u2, w is not None), _spread(given, rstd, xhat)
    assert inner is not None
    own = _holds(inner, spread) and any(t is not None for t in (w, u1, u2))
    return (like(inner.mul_(spread) if own else inner * spread, d),)


def _tangent(
    part: Part, xt: Tensor | None, xhat: Tensor, rstd: Tensor, mt: Tensor | None, q: Tensor | None,
    w: Tensor | None, wt: Tensor | None, bt: Tensor | None,
) -> Results:  # fmt: skip
    given: Normalisation = part.constants
    xhat_t = _times(_centred(given, None if xt is None else wide(xt), xhat, mt, q), _spread(given, rstd, xhat))
    yt = None
    if part.wants[1]:
        yt = None if bt is None else _row(given, bt)
        if wt is not None:
            yt = _plus_product(yt, wide(xhat), _row(given, wt))
        yt = _plus(yt, _scaled(given, xhat_t, w))
        yt = None if yt is None else like(yt, xhat).expand(tasks_of(yt, xhat), *xhat.shape[1:])
    return like(xhat_t, xhat) if xhat_t is not None and part.wants[0] else None, yt


def _back_tangent(
    part: Part, d: Tensor | None, dt: Tensor | None, xhat: Tensor, xhat_t: Tensor | None, rstd: Tensor,
    q: Tensor | None, u1: Tensor | None, u2: Tensor | None, u1t: Tensor | None, u2t: Tensor | None,
    w: Tensor | None, wt: Tensor | None,
) -> Results:  # fmt: skip
    given: Normalisation = part.constants
    d, dt = (None if t is None else wide(t) for t in (d, dt))
    spread = _spread(given, rstd, xhat)
    et = _plus(_scaled(given, dt, w), _times(d, None if wt is None else _row(given, wt)))
    inner = _centred(given, et, xhat, u1t, u2t)
    if u2 is not None and xhat_t is not None:
        inner = _plus(inner, _times(xhat_t, -_spread(given, u2, xhat)))
    if q is not None:
        first = _centred(given, _scaled(given, d, w), xhat, u1, u2)
        inner = _plus_product(inner, first, -_spread(given, q * rstd, xhat))
    return (None if inner is None else like(inner * spread, xhat),)


NORM: dict[str, TorchKernel] = {
    "norm.stats": _stats,
    "norm.sums": _sums,
    "norm.stats_tangent": _stats_tangent,
    "norm.sums_tangent": _sums_tangent,
    "norm.apply": _apply,
    "norm.back": _back,
    "norm.tangent": _tangent,
    "norm.back_tangent": _back_tangent,
}


# --- what the formulas are made of; an absent operand is zero, but for a weight, which is one -------------------------


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _plus_product(a: Tensor | None, x: Tensor | None, y: Tensor) -> Tensor | None:
    return a if x is None else x * y if a is None else torch.addcmul(a, x, y)


def _row(given: Normalisation, w: Tensor) -> Tensor:
    """The row of a parameter that is read  # [T or 1, 1, 1, F]"""
    return wide(w[:, given.row]).unsqueeze(1).unsqueeze(1)


def _scaled(given: Normalisation, x: Tensor | None, w: Tensor | None) -> Tensor | None:
    return x if x is None or w is None else x * _row(given, w)


def _spread(given: Normalisation, s: Tensor, x: Tensor) -> Tensor:
    """A statistic, one for every feature where that is not what it is, or broadcasts to."""
    few = given.kind == Norm.GROUP and 1 < given.groups < x.shape[3]
    return s.repeat_interleave(x.shape[3] // given.groups, 3) if few else s


def _holds(x: Tensor, *others: Tensor) -> bool:
    """Whether x has the shape of a result of all of them.

    In its memory, where nobody else reads it, the result costs a CPU 5 ms where a new plane of 120 MB costs 40.
    """
    return all(n >= m for other in others for n, m in zip(x.shape, other.shape, strict=True))


def _centred(
    given: Normalisation, e: Tensor | None, xhat: Tensor, u1: Tensor | None, u2: Tensor | None, own: bool = False
) -> Tensor | None:
    """e - u1 - xhat u2, in the memory of e where it is the caller's `own`."""
    if e is not None and u1 is not None:
        spread = _spread(given, u1, xhat)
        e, own = e.sub_(spread) if own and _holds(e, spread) else e - spread, True
    if u2 is None:
        return e
    factor, xhat = -_spread(given, u2, xhat), wide(xhat)
    if own and e is not None and _holds(e, xhat, factor):
        return e.addcmul_(xhat, factor)
    return _plus_product(e, xhat, factor)


def _mean(given: Normalisation, x: Tensor, rstd: Tensor | None) -> Tensor:
    if given.kind == Norm.BATCH:
        return x.mean((1, 2), keepdim=True)
    if given.kind == Norm.GROUP:
        return x.unflatten(3, (given.groups, -1)).mean((2, 4)).unsqueeze(2)
    if given.kind != Norm.UNIT:
        return x.mean(3, keepdim=True)
    assert rstd is not None
    long = rstd < rstd.new_full((), given.eps).reciprocal_()
    return torch.where(long, x.sum(3, keepdim=True), 0.0)


def _reduced(
    given: Normalisation, x: Tensor | None, w: Tensor | None, rstd: Tensor | None, mean: bool, total: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(m (w x), the sum of x as the parameter's gradient is stored), each where it is wanted."""
    if x is None:
        return None, None
    batch = given.kind == Norm.BATCH  # one pass gives both
    sums = x.sum((1, 2), keepdim=True) if total or batch else None
    if batch and sums is not None:
        own = _scaled(given, sums / (x.shape[1] * x.shape[2]), w) if mean else None
    else:
        scaled = _scaled(given, x, w) if mean else None
        own = None if scaled is None else _mean(given, scaled, rstd)
    return own, _of_row(given, sums) if total and sums is not None else None


def _of_row(given: Normalisation, sums: Tensor) -> Tensor:
    """[T, 1, 1, F] as the gradient of a parameter  # [T or 1, rows, F]"""
    row = (sums.sum(0, keepdim=True) if given.over_tasks else sums).squeeze(2)
    return row if given.rows == 1 else F.pad(row, (0, 0, given.row, given.rows - given.row - 1))
