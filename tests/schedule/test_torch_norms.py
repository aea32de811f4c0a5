"""Normalisations of the `torch` provider against torch.func in float64, put together as the schedule does."""

from __future__ import annotations

import pytest
import torch
from cases.schedule_kernels import close, derivatives, filled, presence, run, scattered
from torch import Tensor

from mtml_kernels.program.layers.norm import Norm, normalise
from mtml_kernels.schedule.kernels import Normalisation

T, N, R, F = 3, 4, 5, 6
KINDS = [
    (Norm.BATCH, 1e-3, 1),
    (Norm.GROUP, 1e-3, 1),
    (Norm.GROUP, 1e-3, 3),
    (Norm.GROUP, 1e-3, F),
    (Norm.LAYER, 1e-3, 1),
    (Norm.RMS, -1.0, 1),
    (Norm.RMS, 0.1, 1),
    (Norm.UNIT, 1e-12, 1),
    (Norm.UNIT, 2.4, 1),  # some rows are shorter
]


def reference(given: Normalisation, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    rows = []
    for t in range(max(x.shape[0], 1 if w is None else w.shape[0])):
        own = [None if p is None else p[min(t, p.shape[0] - 1)] for p in (x, w, b)]
        affine = [None if p is None else p[given.row] for p in own[1:]]
        rows.append(normalise(given.kind, own[0], given.eps, given.groups, *affine))
    return torch.stack(rows)


class Composed:
    """The kernels in the order in which a schedule calls them."""

    def __init__(self, given: Normalisation, x: Tensor, w: Tensor | None, b: Tensor | None) -> None:
        self.given, self.w = given, w
        self.centred = given.kind not in (Norm.RMS, Norm.UNIT)
        mean, self.rstd = run("norm.stats", given, x, wants=(self.centred, True))
        affine = w is not None or b is not None
        self.xhat, y = run("norm.apply", given, x, mean, self.rstd, w, b, wants=(True, affine))
        self.y = y if affine else self.xhat

    def backward(self, d: Tensor, dw: bool, db: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wants = (self.centred, True, dw, db)
        self.u1, self.u2, *grads = run("norm.sums", self.given, d, self.xhat, self.rstd, self.w, wants=wants)
        return run("norm.back", self.given, d, self.xhat, self.rstd, self.u1, self.u2, self.w)[0], *grads

    def tangent(self, xt: Tensor | None, wt: Tensor | None, bt: Tensor | None) -> Tensor | None:
        self.mt = self.q = None
        if xt is not None:
            wants = (self.centred, True)
            self.mt, self.q = run("norm.stats_tangent", self.given, xt, self.xhat, self.rstd, wants=wants)
        affine = any(p is not None for p in (self.w, wt, bt))
        operands = (xt, self.xhat, self.rstd, self.mt, self.q, self.w, wt, bt)
        self.xhat_t, yt = run("norm.tangent", self.given, *operands, wants=(True, affine))
        return yt if affine else self.xhat_t

    def back_tangent(self, d: Tensor | None, dt: Tensor | None, wt: Tensor | None, dw: bool, db: bool) -> list[Tensor]:
        if d is None:
            u1 = u2 = None
        else:
            u1, u2 = self.u1, self.u2
        operands = (d, dt, self.xhat, self.xhat_t, self.rstd, self.w, wt)
        u1t, u2t, *grads = run("norm.sums_tangent", self.given, *operands, wants=(self.centred, True, dw, db))
        operands = (d, dt, self.xhat, self.xhat_t, self.rstd, self.q, u1, u2, u1t, u2t, self.w, wt)
        return [run("norm.back_tangent", self.given, *operands)[0], *grads]


@pytest.mark.parametrize(("kind", "eps", "groups"), KINDS)
@pytest.mark.parametrize("affine", ["own", "shared", "shared, summed over tasks", "a row of three", "none"])
def test_norm(kind: Norm, eps: float, groups: int, affine: str) -> None:
    rows, row, over = 3 if "row" in affine else 1, 1 if "row" in affine else 0, "summed" in affine
    given = Normalisation(int(kind), eps, groups, row, rows, over)
    x, d, dt, xt = (scattered(T, N, R, F) for _ in range(4))
    sets = T if affine == "own" else 1
    params = [] if affine == "none" else [torch.randn(sets, rows, F, dtype=x.dtype) for _ in range(2)]
    full = [p if over else p.expand(T, -1, -1).clone() for p in params]
    tangents = [xt, *(torch.randn(p.shape, dtype=x.dtype) for p in full)]
    dw = db = bool(params)
    for each in presence(d, dt, *tangents):
        values = filled(each, [d, dt, *tangents])
        f = lambda *at: reference(given, *at)  # noqa: E731
        y, yt, first, second = derivatives(f, [x, *full], values[2:], values[0], values[1])
        kernels = Composed(given, x, *(params or (None, None)))
        close(kernels.y, y, "y")
        if each[0] is not None:
            for mine, expected in zip(kernels.backward(d, dw, db), first, strict=False):
                close(mine, expected, "backward")
        moved = (*each[2:], None, None)[:3]
        if any(t is not None for t in moved):
            close(kernels.tangent(*moved), yt, "yt")
        else:
            kernels.xhat_t = kernels.q = None
        if each[0] is not None or each[1] is not None:
            mine = kernels.back_tangent(each[0], each[1], moved[1], dw, db)
            for role, got, expected in zip(("dxt", "dwt", "dbt"), mine, second, strict=False):
                close(got, expected, f"{role} of {[t is not None for t in each]}")


def test_without_its_second_term_the_tangent_of_backward_is_wrong() -> None:
    given = Normalisation(int(Norm.BATCH), 1e-3, 1, 0, 1, False)
    x, d, xt = (scattered(T, N, R, F) for _ in range(3))
    kernels = Composed(given, x, None, None)
    kernels.backward(d, False, False)
    kernels.tangent(xt, None, None)
    right = kernels.back_tangent(d, d, None, False, False)[0]
    kernels.q = None
    with pytest.raises(AssertionError):
        close(kernels.back_tangent(d, d, None, False, False)[0], right)


def test_a_row_of_zeros_has_no_length() -> None:
    given = Normalisation(int(Norm.UNIT), 1e-12, 1, 0, 1, False)
    x, d = scattered(T, N, R, F), scattered(T, N, R, F) * 1e-12
    x[0, 0, 0] = 0
    kernels = Composed(given, x, None, None)
    close(kernels.y, reference(given, x))
    close(kernels.backward(d, False, False)[0], derivatives(lambda x: reference(given, x), [x], [x], d, d)[2][0])
