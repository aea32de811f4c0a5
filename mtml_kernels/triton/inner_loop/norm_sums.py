"""Normalisations: their statistics, and the sums that their derivatives need.

With m the mean over what the kind normalises together, e = w d and et = w dt + wt d:

    mean = m x           rstd = (m (x - mean)^2 + eps)^(-1/2)       u1t = m et      u2t = m (et xhat + e xhat_t)
    dwt = sum (dt xhat + d xhat_t)          dbt = sum dt

`norm.sums` is this with its d as dt and nothing along it, `norm.stats_tangent` that without w. Where features are
normalised one by one (BATCH), or some of a sample with all its rows (GROUP), everything is made of sums of columns: of
every feature, over the rows of the set or of the sample. Else (LAYER, RMS, UNIT) the means are sums of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Normalisation
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.norm_columns import (
    column_kernel,
    column_tile,
    means_kernel,
    moments_kernel,
    rstd_kernel,
)
from mtml_kernels.triton.inner_loop.norm_rows import row_means_kernel, row_stats_kernel, row_tile
from mtml_kernels.triton.inner_loop.operands import (
    OPTIONS,
    Results,
    new,
    power,
    shape_of,
    spread,
    strides,
    tasks_by_rows,
    type_of,
)
from mtml_kernels.triton.inner_loop.sums import total

__all__ = ["FINISHING", "NORM_SUMS"]

_BY_COLUMNS = (Norm.BATCH, Norm.GROUP)
_MEANLESS = (Norm.RMS, Norm.UNIT)


class Sets(NamedTuple):
    """How columns are summed: `sets` of `rows` each, of `features` that lie in `groups`."""

    sets: int
    rows: int
    features: int
    groups: int

    @staticmethod
    def of(given: Normalisation, shape: tuple[int, ...]) -> Sets:
        """Of a plane [T, N, R, F]."""
        tasks, samples, rows, features = shape
        if given.kind == Norm.BATCH:
            return Sets(tasks, samples * rows, features, features)
        return Sets(tasks * samples, rows, features, given.groups)

    @property
    def together(self) -> int:
        """Features of a group."""
        return self.features // self.groups


def _columns(given: Normalisation, shape: tuple[int, ...], *planes: Tensor | None) -> list[Tensor | None]:
    """The planes as sets of rows  # [sets, rows, F]"""
    if given.kind == Norm.BATCH:
        return tasks_by_rows(shape, *planes)
    return [None if t is None else t.flatten(0, 1) for t in spread(shape, *planes)]


def _statistic(given: Normalisation, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a mean."""
    tasks, samples, rows, features = shape
    if given.kind == Norm.BATCH:
        return tasks, 1, 1, features
    return (tasks, samples, 1, given.groups) if given.kind == Norm.GROUP else (tasks, samples, rows, 1)


# --- statistics -------------------------------------------------------------------------------------------------------


def _stats(part: Part, x: Tensor) -> Results:
    given: Normalisation = part.constants
    shape = _statistic(given, tuple(x.shape))
    mean, rstd = new(shape, x), new(shape, x)
    if x.numel():
        (_moments if given.kind in _BY_COLUMNS else _row_stats)(given, x, mean, rstd)
    else:  # of nothing, as PyTorch has it
        mean, rstd = (t.fill_(float("nan")) for t in (mean, rstd))
    return mean if part.wants[0] else None, rstd


def _moments(given: Normalisation, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    own = Sets.of(given, tuple(x.shape))
    (sets,) = _columns(given, tuple(x.shape), x)
    assert sets is not None
    tile = column_tile(own.rows, own.features)
    chunks = -(-own.rows // tile.chunk)
    whole = chunks == own.together == 1
    grid = (own.sets, chunks, -(-own.features // tile.cols))
    parts = (mean, mean, rstd) if whole else new((3, own.sets, chunks, own.features), x).unbind()
    with on(x.device):
        moments_kernel[grid](
            sets, *parts, own.rows, own.features, *sets.stride(), given.eps, whole, *tile, type_of(x), **OPTIONS
        )
        if not whole:
            _finish_stats(given, parts, (mean, rstd), own, tile.chunk)


def _finish_stats(
    given: Normalisation, parts: Sequence[Tensor], results: tuple[Tensor, Tensor], own: Sets, chunk: int
) -> None:
    """mean and rstd from the (mean, left, rest) [sets, chunks, F] of moments_kernel."""
    chunks = parts[0].shape[1]
    height, width = _finish_tile(chunks * own.together, own.groups)
    rstd_kernel[(own.sets, -(-own.groups // width))](
        *parts, *results, own.rows, chunks, own.groups, own.together, chunk, given.eps, height, width,
        type_of(parts[0]), **OPTIONS,
    )  # fmt: skip


def _stats_of_shares(part: Part, shares: Tensor) -> Results:
    given, rows, chunk = part.constants
    _, tasks, _, features = shares.shape
    mean, rstd = (new((tasks, 1, 1, features), shares) for _ in range(2))
    if shares.numel():
        with on(shares.device):
            _finish_stats(given, shares.unbind(), (mean, rstd), Sets(tasks, rows, features, features), chunk)
    return mean if part.wants[0] else None, rstd


def _finish_tile(parts: int, groups: int) -> tuple[int, int]:
    """The launch policy of what puts chunks and features together: 1024 numbers at a time, of 8 groups if there are,
    which are a sector of 32 bytes, so that few tasks are many programs.
    """
    width = power(groups, 8)
    return power(parts, 1024 // width), width


def _row_stats(given: Normalisation, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    tasks, samples, rows, features = x.shape
    (flat,) = tasks_by_rows(tuple(x.shape), x)
    assert flat is not None
    tile = row_tile(samples * rows, features)
    eps = torch.finfo(x.dtype).eps if given.eps < 0 else given.eps
    with on(x.device):
        row_stats_kernel[(tasks * -(-samples * rows // tile.rows),)](
            flat, mean, rstd, samples * rows, features, *flat.stride(), given.kind, eps, *tile, type_of(x), **OPTIONS
        )


# --- sums of derivatives ----------------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    """Those of `norm.sums_tangent`, by its roles."""

    d: Tensor | None
    dt: Tensor | None
    xhat: Tensor
    xhat_t: Tensor | None
    rstd: Tensor | None
    w: Tensor | None
    wt: Tensor | None

    @property
    def planes(self) -> tuple[Tensor | None, ...]:
        """[T, N, R, F]"""
        return self.d, self.dt, self.xhat, self.xhat_t

    def flags(self) -> tuple[bool, ...]:
        """Which of d, dt, xhat_t, w and wt there are."""
        return tuple(t is not None for t in (self.d, self.dt, self.xhat_t, self.w, self.wt))


def _sums(part: Part, d: Tensor, xhat: Tensor, rstd: Tensor | None, w: Tensor | None) -> Results:
    return _all_sums(part.constants, part.wants, _Operands(None, d, xhat, None, rstd, w, None))


def _stats_tangent(part: Part, xt: Tensor, xhat: Tensor, rstd: Tensor | None) -> Results:
    wants = (*part.wants, False, False)
    return _all_sums(part.constants, wants, _Operands(None, xt, xhat, None, rstd, None, None))[:2]


def _sums_tangent(
    part: Part, d: Tensor | None, dt: Tensor | None, xhat: Tensor, xhat_t: Tensor | None,
    rstd: Tensor | None, w: Tensor | None, wt: Tensor | None,
) -> Results:  # fmt: skip
    return _all_sums(part.constants, part.wants, _Operands(d, dt, xhat, xhat_t, rstd, w, wt))


def _all_sums(given: Normalisation, wants: tuple[bool, ...], own: _Operands) -> Results:
    moved = own.dt is not None or (own.d is not None and own.xhat_t is not None)
    bent = own.wt is not None and own.d is not None
    some = (own.dt is not None or bent, moved or bent, moved, own.dt is not None)
    u1, u2, dw, db = (want and there for want, there in zip(wants, some, strict=True))
    if not (u1 or u2 or dw or db):
        return None, None, None, None
    if given.kind in _BY_COLUMNS:
        return _by_columns(given, (u1, u2, dw, db), own)
    means = _by_rows(given, (u1, u2), own) if u1 or u2 else (None, None)
    d, dt, xhat, xhat_t = own.planes
    to = _params(given, shape_of(*own.planes))
    products = (dt, None if dt is None else xhat, None if xhat_t is None else d, None if d is None else xhat_t)
    of_w = _of_row(given, total(to, *products)) if dw else None
    return *means, of_w, _of_row(given, total(to, dt)) if db else None


def _row_of(given: Normalisation, w: Tensor | None, tasks: int) -> Tensor | None:
    """The row of a parameter that is read  # [T, F]"""
    return None if w is None else w[:, given.row].expand(tasks, -1)


def _params(given: Normalisation, shape: tuple[int, ...]) -> tuple[int, ...]:
    """To what data [T, N, R, F] are summed for a parameter."""
    return 1 if given.over_tasks else shape[0], 1, 1, shape[3]


def _of_row(given: Normalisation, sums: Tensor) -> Tensor:
    """Sums [T or 1, 1, 1, F] as the gradient of a parameter  # [T or 1, rows, F]"""
    row = sums.squeeze(2)
    return row if given.rows == 1 else F.pad(row, (0, 0, given.row, given.rows - given.row - 1))


def _by_rows(given: Normalisation, wants: tuple[bool, bool], own: _Operands) -> tuple[Tensor | None, Tensor | None]:
    tasks = max(t.shape[0] for t in own if t is not None)
    shape = (tasks, *shape_of(*own.planes)[1:])
    rows, features = shape[1] * shape[2], shape[3]
    one = _statistic(given, shape)
    u1, u2 = (new(one, own.xhat) if wants[0] else None), new(one, own.xhat)
    planes = tasks_by_rows(shape, *own.planes)
    rstd = None if own.rstd is None else own.rstd.expand(one).flatten(1)
    affine = _row_of(given, own.w, tasks), _row_of(given, own.wt, tasks)
    operands = (*planes, rstd, *affine)
    tile = row_tile(rows, features)
    if u2.numel():
        with on(own.xhat.device):
            row_means_kernel[(tasks * -(-rows // tile.rows),)](
                *(own.xhat if t is None else t for t in operands), u2 if u1 is None else u1, u2, rows, features,
                *(step for t, dims in zip(operands, (3, 3, 3, 3, 2, 2, 2), strict=True) for step in strides(t, dims)),
                *own.flags(), u1 is not None, given.kind, given.eps, *tile, type_of(own.xhat), **OPTIONS,
            )  # fmt: skip
    return u1, u2 if wants[1] else None


def _by_columns(given: Normalisation, wants: tuple[bool, ...], own: _Operands) -> Results:
    tasks = max(t.shape[0] for t in own if t is not None)
    data = shape_of(*own.planes)
    shape = (tasks, *data[1:])
    sets = Sets.of(given, shape)
    tile = column_tile(sets.rows, sets.features)
    chunks = -(-sets.rows // tile.chunk)
    whole = chunks == sets.together == 1 and given.kind == Norm.BATCH
    one = _statistic(given, shape)
    sums, u1, u2 = new((4, sets.sets, chunks, sets.features), own.xhat), new(one, own.xhat), new(one, own.xhat)
    if sums.numel():
        _column_launches(given, own, sets, (sums, u1, u2), whole, wants[0] or wants[1])
    else:  # of nothing, as PyTorch has it
        u1, u2 = (u.fill_(float("nan")) for u in (u1, u2))
    parts = chunks if given.kind == Norm.BATCH else chunks * shape[1]
    of_tasks = sums.view(4, tasks, parts, 1, sets.features)[:, : data[0]]  # tasks beyond the data's have equal sums
    return u1 if wants[0] else None, u2 if wants[1] else None, *_of_params(given, data, wants, of_tasks)


def _of_params(given: Normalisation, data: tuple[int, ...], wants: tuple[bool, ...], sums: Tensor) -> Results:
    """dw and db from A1 and A2 of all parts of every task  # [2 or more, T, parts, 1, F]"""
    to = _params(given, data)
    dw, db = (_of_row(given, _whole(to, sums[i])) if wants[3 - i] else None for i in (1, 0))
    return dw, db


def _whole(to: tuple[int, ...], parts: Tensor) -> Tensor:
    """The sum of the parts; of one, itself, which nobody else has."""
    return parts if parts.shape == to else total(to, parts)


def _column_launches(
    given: Normalisation, own: _Operands, sets: Sets, results: tuple[Tensor, Tensor, Tensor], whole: bool, means: bool
) -> None:
    sums, u1, u2 = results
    tasks, chunks = u1.shape[0], sums.shape[2]
    tile, shape = column_tile(sets.rows, sets.features), (tasks, *shape_of(*own.planes)[1:])
    w, wt = _row_of(given, own.w, tasks), _row_of(given, own.wt, tasks)
    planes = _columns(given, shape, *own.planes)
    affine = [own.xhat if t is None else t for t in (w, wt)]
    size = sets.sets * chunks * sets.features
    steps = [step for t in planes for step in strides(t, 3)]
    of_affine = [step for t in (w, wt) for step in strides(t, 2)]
    with on(own.xhat.device):
        column_kernel[(sets.sets, chunks, -(-sets.features // tile.cols))](
            *(own.xhat if t is None else t for t in planes), *affine, sums, u1, u2, sets.rows, sets.features, size,
            *steps, *of_affine, *own.flags(), whole, *tile, type_of(own.xhat), **OPTIONS,
        )  # fmt: skip
        if means and not whole:
            _finish_means(sums, (w, wt if own.d is not None else None), (u1, u2), sets)


def _finish_means(
    sums: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor],
    sets: Sets,
    params: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """u1 and u2 from the sums [2 or 4, sets, chunks, F] of column_kernel, and dw and db [sets, 1, F] of BATCH."""
    _, _, chunks, _ = sums.shape
    height, width = _finish_tile(chunks * sets.together, sets.groups)
    steps = [step for t in affine for step in strides(t, 2)]
    operands = [sums if t is None else t for t in affine]
    means_kernel[(sets.sets, -(-sets.groups // width))](
        sums, *operands, *results, *(sums if t is None else t for t in params), sets.rows, chunks, sums.stride(0),
        sets.sets // results[0].shape[0], *steps, sets.groups, sets.together, *(t is not None for t in affine),
        *(t is not None for t in params), height, width, type_of(sums), **OPTIONS,
    )  # fmt: skip


def _sums_of_shares(part: Part, shares: Tensor, w: Tensor | None, wt: Tensor | None) -> Results:
    given, rows, _ = part.constants
    numbers, tasks, chunks, features = shares.shape
    wants = (*part.wants, False, False)[:4]
    u1, u2 = (new((tasks, 1, 1, features), shares) for _ in range(2))
    own = not given.over_tasks and given.rows == 1  # a gradient of its own, all of it
    params = [new((tasks, 1, features), shares) if own and want else None for want in wants[2:]]
    if shares.numel():
        affine = _row_of(given, w, tasks), _row_of(given, wt, tasks)
        with on(shares.device):
            _finish_means(shares, affine, (u1, u2), Sets(tasks, rows, features, features), (params[0], params[1]))
    if not own:
        params = [*_of_params(given, (tasks, 1, 1, features), wants, shares.view(numbers, tasks, chunks, 1, features))]
    return u1 if wants[0] else None, u2 if wants[1] else None, *params[: len(part.wants) - 2]


NORM_SUMS: dict[str, Any] = {
    "norm.stats": _stats,
    "norm.sums": _sums,
    "norm.stats_tangent": _stats_tangent,
    "norm.sums_tangent": _sums_tangent,
}
# What puts the shares of launches together (shares.py).
FINISHING: dict[str, Any] = {
    "norm.stats.finish": _stats_of_shares,
    "norm.sums.finish": _sums_of_shares,
    "norm.stats_tangent.finish": _sums_of_shares,
    "norm.sums_tangent.finish": _sums_of_shares,
}
