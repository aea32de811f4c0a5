"""Softmax and its logarithm over features, in rows [F].

              backward (of d), tangent (of xt)                back_tangent: backward of dt, and
softmax       y (d - <d, y>), the same of xt                  yt (d - <d, y>) - y <d, yt>
log_softmax   d - exp(y) sum d, xt - <exp(y), xt>             -exp(y) yt sum d
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.program.layers.softmax import Softmax
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import alike
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import (
    OPTIONS,
    Results,
    new,
    power,
    shape_of,
    strides,
    tasks_by_rows,
    type_of,
)

__all__ = ["SOFTMAX", "softmax_tile"]

# What the first-order term is: y (d - <d, y>), d - exp(y) sum d, d - <exp(y), d>.
_SOFTMAX, _LOG_BACK, _LOG_ALONG = (tl.constexpr(form) for form in range(3))
LOG = tl.constexpr(int(Softmax.LOG_SOFTMAX))


def softmax_tile(rows: int, features: int) -> tuple[int, int]:
    """The launch policy: rows of a program, and their features at a time.

    1024 numbers are 8 for each of 128 threads. Rows of up to 1024 features stand in L1 when they are read again, and
    shorter ones share a program. Of one task's shape alone. Reasoned, not yet measured.
    """
    cols = power(features, 1024)
    return power(rows, 1024 // cols), cols


@triton.jit
def softmax_kernel(
    x,  # [T, M, F]
    y,  # [T, M, F]
    M, F, x_t, x_m, x_f,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y = exp(x - max x) / sum exp(x - max x), or its logarithm"""
    task, block = task_and_block(tl.cdiv(M, ROWS))
    m = block * ROWS + tl.arange(0, ROWS)
    row = m.to(tl.int64)[:, None]
    x_at, y_at = x + task * x_t + row * x_m, y + (task * M + row) * F
    top, total = tl.full([ROWS], float("-inf"), TYPE), tl.zeros([ROWS], TYPE)
    for first in range(0, F, COLS):
        f = first + tl.arange(0, COLS)[None, :]
        value = tl.load(x_at + f * x_f, mask=(m < M)[:, None] & (f < F), other=float("-inf")).to(TYPE)
        above = tl.maximum(top, tl.max(value, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)  # a tile of -inf alone must not make NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(value - shift[:, None]), 1)
        top = above
    log_total, share = tl.log(total)[:, None], (1.0 / total)[:, None]
    for first in range(0, F, COLS):
        f = first + tl.arange(0, COLS)[None, :]
        live = (m < M)[:, None] & (f < F)
        value = tl.load(x_at + f * x_f, mask=live, other=float("-inf")).to(TYPE) - top[:, None]
        value = value - log_total if KIND == LOG else tl.exp(value) * share
        tl.store(y_at + f, value, mask=live)


@triton.jit
def _weight(y, FORM: tl.constexpr):
    """What the term's sum weighs d with."""
    if FORM == _SOFTMAX:
        w = y
    elif FORM == _LOG_BACK:
        w = y * 0.0 + 1.0
    else:
        w = tl.exp(y)
    return w


@triton.jit
def softmax_back_kernel(
    d, dt, y, yt,  # [T, M, F]
    dx,  # [T, M, F]
    M, F, d_t, d_m, d_f, dt_t, dt_m, dt_f, y_t, y_m, y_f, yt_t, yt_m, yt_f,
    FORM: tl.constexpr, STRAIGHT: tl.constexpr, BENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """dx: STRAIGHT the first-order term of dt, BENT that of d along yt; at least one of them."""
    task, block = task_and_block(tl.cdiv(M, ROWS))
    m = block * ROWS + tl.arange(0, ROWS)
    row = m.to(tl.int64)[:, None]
    d_at, dt_at = d + task * d_t + row * d_m, dt + task * dt_t + row * dt_m
    y_at, yt_at = y + task * y_t + row * y_m, yt + task * yt_t + row * yt_m
    of_dt, of_d, moved = tl.zeros([ROWS], TYPE), tl.zeros([ROWS], TYPE), tl.zeros([ROWS], TYPE)
    for first in range(0, F, COLS):
        f = first + tl.arange(0, COLS)[None, :]
        live = (m < M)[:, None] & (f < F)
        weight = _weight(tl.load(y_at + f * y_f, mask=live, other=0.0).to(TYPE), FORM)
        if STRAIGHT:
            of_dt += tl.sum(tl.load(dt_at + f * dt_f, mask=live, other=0.0).to(TYPE) * weight, 1)
        if BENT:
            own = tl.load(d_at + f * d_f, mask=live, other=0.0).to(TYPE)
            of_d += tl.sum(own * weight, 1)
            if FORM == _SOFTMAX:
                moved += tl.sum(own * tl.load(yt_at + f * yt_f, mask=live, other=0.0).to(TYPE), 1)
    for first in range(0, F, COLS):
        f = first + tl.arange(0, COLS)[None, :]
        live = (m < M)[:, None] & (f < F)
        p = tl.load(y_at + f * y_f, mask=live, other=0.0).to(TYPE)
        found = tl.zeros([ROWS, COLS], TYPE)
        if STRAIGHT:
            own = tl.load(dt_at + f * dt_f, mask=live, other=0.0).to(TYPE)
            if FORM == _SOFTMAX:
                found = p * (own - of_dt[:, None])
            elif FORM == _LOG_BACK:
                found = own - tl.exp(p) * of_dt[:, None]
            else:
                found = own - of_dt[:, None]
        if BENT:
            along = tl.load(yt_at + f * yt_f, mask=live, other=0.0).to(TYPE)
            if FORM == _SOFTMAX:
                own = tl.load(d_at + f * d_f, mask=live, other=0.0).to(TYPE)
                found += along * (own - of_d[:, None]) - p * moved[:, None]
            else:
                found -= tl.exp(p) * along * of_d[:, None]
        tl.store(dx + (task * M + row) * F + f, found, mask=live)


def _forward(part: Part, x: Tensor) -> Results:
    y = new(x.shape, x, x.dtype)
    if x.numel():
        (rows,) = tasks_by_rows(tuple(x.shape), x)
        assert rows is not None
        tasks, count, features = rows.shape
        height, cols = softmax_tile(count, features)
        with on(x.device):
            softmax_kernel[(tasks * -(-count // height),)](
                rows, y, count, features, *rows.stride(), int(part.constants), height, cols, type_of(x), **OPTIONS
            )
    return (y,)


def _pull(form: tl.constexpr, d: Tensor | None, dt: Tensor | None, y: Tensor, yt: Tensor | None) -> Results:
    if d is None or yt is None:
        d = yt = None
    shape = shape_of(d, dt, y, yt)
    like = next(t for t in (dt, yt) if t is not None)
    dx = new(shape, y, alike(like, y)[0].dtype)
    if dx.numel():
        planes = tasks_by_rows(shape, d, dt, y, yt)
        count, features = shape[1] * shape[2], shape[3]
        height, cols = softmax_tile(count, features)
        with on(y.device):
            softmax_back_kernel[(shape[0] * -(-count // height),)](
                *(y if t is None else t for t in planes), dx, count, features,
                *(step for t in planes for step in strides(t, 3)), form.value, dt is not None, d is not None,
                height, cols, type_of(y), **OPTIONS,
            )  # fmt: skip
    return (dx,)


def _back_tangent(part: Part, d: Tensor | None, dt: Tensor | None, y: Tensor, yt: Tensor | None) -> Results:
    if dt is None and (d is None or yt is None):
        return (None,)
    return _pull(_SOFTMAX if part.constants == Softmax.SOFTMAX else _LOG_BACK, d, dt, y, yt)


def _backward(part: Part, d: Tensor, y: Tensor) -> Results:
    return _back_tangent(part, None, d, y, None)


def _tangent(part: Part, xt: Tensor, y: Tensor) -> Results:
    return _pull(_SOFTMAX if part.constants == Softmax.SOFTMAX else _LOG_ALONG, None, xt, y, None)


SOFTMAX: dict[str, Any] = {
    "softmax.forward": _forward,
    "softmax.backward": _backward,
    "softmax.tangent": _tangent,
    "softmax.back_tangent": _back_tangent,
}
