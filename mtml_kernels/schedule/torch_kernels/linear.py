"""Linear layers: each product is one call, of all tasks' rows at once where they share the matrix.

With m = W^T of one matrix a task, or of one for all:

    forward   y = x m + b       backward  dx = d m^T,  dw = d^T x,  db = sum d        tangents: the product rule
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, like, tasks_of, wide, wide_dtype

__all__ = ["LINEAR", "bias_gradient", "bias_tangent"]

Pair = tuple[Tensor | None, Tensor | None]  # of which an absent one makes the product zero


def _forward(part: Part, x: Tensor, w: Tensor, b: Tensor | None) -> Results:
    return (_times(x, _matrix(part, w), b),)


def _backward(part: Part, d: Tensor, x: Tensor | None, w: Tensor | None) -> Results:
    dx, dw, db = part.wants
    return (
        _times(d, _turned(part, w)) if dx and w is not None else None,
        _gradient(part, [(d, x)]) if dw else None,
        bias_gradient(d, part.constants.over_tasks) if db else None,
    )


def _tangent(
    part: Part, x: Tensor | None, xt: Tensor | None, w: Tensor | None, wt: Tensor | None, bt: Tensor | None
) -> Results:
    pairs = [(xt, _matrix(part, w)), (x, _matrix(part, wt))]
    yt = _products(pairs, bt)
    if yt is None:
        assert bt is not None and x is not None
        return (bias_tangent(bt, x, x.shape[2]),)
    return (yt,)


def _back_tangent(
    part: Part, d: Tensor | None, dt: Tensor | None, x: Tensor | None, xt: Tensor | None,
    w: Tensor | None, wt: Tensor | None,
) -> Results:  # fmt: skip
    dxt, dwt, dbt = part.wants
    return (
        _products([(dt, _turned(part, w)), (d, _turned(part, wt))]) if dxt else None,
        _gradient(part, [(dt, x), (d, xt)]) if dwt else None,
        bias_gradient(dt, part.constants.over_tasks) if dbt and dt is not None else None,
    )


LINEAR: dict[str, TorchKernel] = {
    "linear.forward": _forward,
    "linear.backward": _backward,
    "linear.tangent": _tangent,
    "linear.back_tangent": _back_tangent,
}


def bias_gradient(d: Tensor, over_tasks: bool) -> Tensor:
    """sum d  # [T or 1, 1, O]"""
    over = (0, 1, 2) if over_tasks else (1, 2)
    return d.sum(over, dtype=wide_dtype(d.dtype)).view(1 if over_tasks else d.shape[0], 1, d.shape[3])


def bias_tangent(bt: Tensor, x: Tensor, rows: int) -> Tensor:
    """The tangent [T, N, rows, O] where that of the bias is all there is."""
    tasks, samples = tasks_of(bt, x), x.shape[1]
    return like(bt, x).unsqueeze(1).expand(tasks, samples, rows, bt.shape[2])


def _matrix(part: Part, w: Tensor | None) -> Tensor | None:
    """What rows are multiplied by from the right in forward  # [T or 1, I, O]"""
    return w if w is None or part.constants.turned else w.mT


def _turned(part: Part, w: Tensor | None) -> Tensor | None:
    """And in backward  # [T or 1, O, I]"""
    return w if w is None or not part.constants.turned else w.mT


def _times(x: Tensor, m: Tensor | None, b: Tensor | None = None) -> Tensor:
    """x m + b  # [T, N, R, O] for x [T, N, R, I], m [T, I, O] and b [T, 1, O]"""
    assert m is not None
    m, b = like(m, x), None if b is None else like(b, x)
    _, n, rows, _ = x.shape
    if m.shape[0] == 1:
        flat = x.flatten(0, 2)
        one = b is not None and b.shape[0] == 1
        y = torch.addmm(b[0], flat, m[0]) if b is not None and one else flat.mm(m[0])
        y = y.view(x.shape[0], n, rows, m.shape[2])
        return y if b is None or one else y + b.unsqueeze(1)
    flat = _of_tasks(x, m.shape[0])
    y = flat.bmm(m) if b is None else torch.baddbmm(b, flat, m)
    return y.view(m.shape[0], n, rows, m.shape[2])


def _of_tasks(x: Tensor, tasks: int) -> Tensor:
    """[T, N, R, F] or [1, N, R, F] as [T, N R, F]."""
    flat = x.flatten(1, 2)
    return flat if flat.shape[0] == tasks else flat.expand(tasks, -1, -1)


def _add_times(y: Tensor, x: Tensor, m: Tensor) -> Tensor:
    """y + x m, in place of y, which is contiguous, where y has every task."""
    x, m = like(x, y), like(m, y)
    if y.shape[0] < tasks_of(x, m):
        return _times(x, m) + y
    if m.shape[0] == 1 and x.shape[0] == y.shape[0]:
        y.view(-1, y.shape[3]).addmm_(x.flatten(0, 2), m[0])
    else:
        tasks = y.shape[0]
        y.view(tasks, -1, y.shape[3]).baddbmm_(_of_tasks(x, tasks), m.expand(tasks, -1, -1))
    return y


def _products(pairs: Iterable[Pair], b: Tensor | None = None) -> Tensor | None:
    """The sum of x m over the pairs (x, m) of which nothing is absent, plus b; None where no pair is whole."""
    y: Tensor | None = None
    for x, m in pairs:
        if x is not None and m is not None:
            y = _times(x, m, b) if y is None else _add_times(y, x, m)
    return y


def _gradient(part: Part, pairs: Iterable[Pair]) -> Tensor | None:
    """The sum of d^T x over the pairs (d, x) of which nothing is absent, as W is stored  # [T or 1, rows, cols]"""
    total: Tensor | None = None
    for d, x in pairs:
        if d is not None and x is not None:
            left, right = (x, d) if part.constants.turned else (d, x)
            total = _transposed_times(wide(left), wide(right), part.constants.over_tasks, total)
    return total


def _transposed_times(a: Tensor, b: Tensor, over_tasks: bool, onto: Tensor | None) -> Tensor:
    """onto + a^T b over the rows of each task, or over all rows  # [T or 1, A, B]"""
    tasks = tasks_of(a, b)
    if over_tasks:
        left, right = (t.expand(tasks, -1, -1, -1).flatten(0, 2) for t in (a, b))
        product = left.t().mm(right) if onto is None else onto[0].addmm_(left.t(), right)
        return product.unsqueeze(0)
    left, right = _of_tasks(a, tasks).mT, _of_tasks(b, tasks)
    if onto is None or onto.shape[0] < tasks:
        return left.bmm(right) if onto is None else torch.baddbmm(onto, left, right)
    return onto.baddbmm_(left, right)
