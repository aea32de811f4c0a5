"""Normalisations as instructions: statistics and sums by their points, the rest on elements (schedule.kernels)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from mtml_kernels.cuda.inner_loop.instructions import Factor, Instruction, Operand, View
from mtml_kernels.cuda.inner_loop.lowering import Lowering, lowers, operand_of
from mtml_kernels.cuda.inner_loop.words import ScheduleOp
from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Normalisation

__all__: list[str] = []

Maybe = View | None
Dims3 = tuple[int, int, int]


class _Means:
    """What a kind of normalisation takes its means over, for values [N, R, F]."""

    def __init__(self, given: Normalisation, full: Dims3) -> None:
        n, r, f = full
        self.full, self.given = full, given
        width = f // given.groups if given.kind == Norm.GROUP else f
        self.shape, self.points = {
            Norm.BATCH: ((1, 1, f), (n, r, 1)),
            Norm.GROUP: ((n, 1, f // width), (1, r, width)),
        }.get(Norm(given.kind), ((n, r, 1), (1, 1, f)))
        self.width = width

    @property
    def scale(self) -> float:
        """Of the sum: 1 for UNIT, whose means are sums."""
        return 1.0 if self.given.kind == Norm.UNIT else 1.0 / max(1, math.prod(self.points))

    def factor(self, view: View) -> Factor:
        """A view [N, R, F], [F] or of a statistic's shape, by the statistic and along its points."""
        found = operand_of(view, self.full, self.width if self.given.kind == Norm.GROUP else 0)
        assert found is not None
        kind = self.given.kind
        if kind == Norm.BATCH:
            return Factor(found._replace(n=0, r=0), found.n, found.r, 0)
        if kind == Norm.GROUP:  # the statistic's features are groups
            in_groups = self.shape[2] > 1
            of_group = found.g if in_groups else 0
            return Factor(Operand(found.memory, found.offset, found.n, 0, 0, of_group), 0, found.r, found.f)
        return Factor(found._replace(f=0), 0, 0, found.f)


def _weight(part: Part, w: Maybe) -> Maybe:
    """The row of a parameter [rows, F] that is read  # [F]"""
    if w is None:
        return None
    row = part.constants.row
    return dataclasses.replace(w, shape=w.shape[-1:], strides=w.strides[-1:], offset=w.offset + row * w.strides[-2])


@lowers("norm.stats")
def _stats(lowering: Lowering, part: Part) -> None:
    x, given = lowering.view(part.reads[0]), part.constants
    means = _Means(given, x.padded()[0])
    mean, rstd = map(lowering.new, part.writes)
    n, r, f = means.shape
    eps = given.eps if given.eps >= 0 else torch.finfo(x.memory.dtype).eps
    kind = {Norm.RMS: 1, Norm.UNIT: 2}.get(Norm(given.kind), 0)
    rstd = lowering.scratch(means.shape, x.memory.dtype) if rstd is None else rstd
    lowering.emit(
        Instruction(
            ScheduleOp.MOMENTS, n * r, f, (), (operand_of(mean, means.shape), operand_of(rstd, means.shape)), sample=r,
            wholes=(kind,), reals=(means.scale, eps), points=means.points, terms=[[means.factor(x)]], writes_first=True,
        )
    )  # fmt: skip


def _mean(
    lowering: Lowering, part: Part, plane: int, means: _Means, rstd: Maybe, terms: Sequence[Sequence[Maybe]]
) -> None:
    """A mean of the sum of products."""
    out = lowering.new(plane)
    if out is None:
        return
    there = [[view for view in term if view is not None] for term in terms if term]
    gate, most = (rstd, 1.0 / part.constants.eps) if part.constants.kind == Norm.UNIT else (None, 0.0)
    factors = [[means.factor(view) for view in term] for term in there]
    lowering.sum_of_products(out, means.shape, means.points, factors, means.scale, gate, most)


def _total(lowering: Lowering, part: Part, plane: int, full: Dims3, terms: Sequence[Sequence[View]]) -> None:
    """The gradient of a parameter [rows, F], of which one row is read."""
    out = lowering.new(plane)
    if out is None:
        return
    if part.constants.rows > 1:
        lowering.copy(None, out)
    row = dataclasses.replace(
        out, shape=out.shape[-1:], strides=out.strides[-1:], offset=out.offset + part.constants.row * out.strides[-2]
    )
    factors = [[_by_feature(view, full) for view in term] for term in terms]
    lowering.sum_of_products(row, (1, 1, full[2]), (full[0], full[1], 1), factors)


def _by_feature(view: View, full: Dims3) -> Factor:
    found = operand_of(view, full)
    assert found is not None
    return Factor(found._replace(n=0, r=0), found.n, found.r, 0)


def _terms(*terms: Sequence[Maybe] | None) -> list[list[View]]:
    """Those of which every factor is there."""
    whole = [[view for view in term if view is not None] for term in terms if term and all(v is not None for v in term)]
    return whole


def _weighed(term: Sequence[Maybe], w: Maybe) -> list[Maybe]:
    """A product, times a weight that counts as 1 where it is absent."""
    return [*term] if w is None else [w, *term]


@lowers("norm.sums")
def _sums(lowering: Lowering, part: Part) -> None:
    d, xhat, rstd, w = map(lowering.maybe, part.reads)
    assert d is not None
    full, weight = d.padded()[0], _weight(part, w)
    means = _Means(part.constants, full)
    _mean(lowering, part, part.writes[0], means, rstd, _terms(_weighed([d], weight)))
    _mean(lowering, part, part.writes[1], means, rstd, _terms(_weighed([d, xhat], weight)))
    _total(lowering, part, part.writes[2], full, _terms([d, xhat]))
    _total(lowering, part, part.writes[3], full, _terms([d]))


@lowers("norm.stats_tangent")
def _stats_tangent(lowering: Lowering, part: Part) -> None:
    xt, xhat, rstd = map(lowering.maybe, part.reads)
    assert xt is not None
    means = _Means(part.constants, xt.padded()[0])
    _mean(lowering, part, part.writes[0], means, rstd, _terms([xt]))
    _mean(lowering, part, part.writes[1], means, rstd, _terms([xhat, xt]))


@lowers("norm.sums_tangent")
def _sums_tangent(lowering: Lowering, part: Part) -> None:
    d, dt, xhat, xhat_t, rstd, w, wt = map(lowering.maybe, part.reads)
    assert xhat is not None
    full, weight, moved = xhat.padded()[0], _weight(part, w), _weight(part, wt)
    means = _Means(part.constants, full)
    of_wt = [moved, d] if moved is not None else None
    _mean(lowering, part, part.writes[0], means, rstd, _terms(_weighed([dt], weight), of_wt))
    second = _terms(
        _weighed([dt, xhat], weight), _weighed([d, xhat_t], weight), None if of_wt is None else [*of_wt, xhat]
    )
    _mean(lowering, part, part.writes[1], means, rstd, second)
    _total(lowering, part, part.writes[2], full, _terms([dt, xhat], [d, xhat_t]))
    _total(lowering, part, part.writes[3], full, _terms([dt]))


_ON_ELEMENTS = {
    "norm.apply": (ScheduleOp.NORM_APPLY, (3, 4)),
    "norm.back": (ScheduleOp.NORM_BACK, (5,)),
    "norm.tangent": (ScheduleOp.NORM_TANGENT, (5, 6, 7)),
    "norm.back_tangent": (ScheduleOp.NORM_TWICE, (10, 11)),
}


@lowers(*_ON_ELEMENTS)
def _on_elements(lowering: Lowering, part: Part) -> None:
    op, params = _ON_ELEMENTS[part.kernel]
    given: Normalisation = part.constants
    reads = [lowering.maybe(plane) for plane in part.reads]
    for at in params:
        reads[at] = _weight(part, reads[at])
    writes = [lowering.new(plane) for plane in part.writes]
    features = next(view for view in writes if view is not None).shape[-1]
    lowering.elements(op, reads, writes, group=features // given.groups if given.kind == Norm.GROUP else 0)
