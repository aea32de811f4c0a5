"""Sums and products of values, what moves elements without changing them, and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.torch_kernels.common import Results, TorchKernel, alike, like, summed, wide

__all__ = ["MOVES"]


def _add(part: Part, a: Tensor, b: Tensor) -> Results:
    a, b = alike(a, b)
    return (a + b,)


def _mul(part: Part, a: Tensor, b: Tensor) -> Results:
    a, b = alike(a, b)
    return (a * b,)


def _mul_tangent(part: Part, a: Tensor | None, at: Tensor | None, b: Tensor | None, bt: Tensor | None) -> Results:
    return (_two_products(at, b, a, bt),)


def _mul_backward(part: Part, d: Tensor | None, dt: Tensor | None, b: Tensor | None, bt: Tensor | None) -> Results:
    whole = _two_products(dt, b, d, bt)
    return (None if whole is None else summed(whole, part.constants.shape),)


def _two_products(a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> Tensor | None:
    """a b + c d, of which a product with an absent factor is zero."""
    if a is None or b is None:
        return None if c is None or d is None else torch.mul(*alike(c, d))
    product = torch.mul(*alike(a, b))
    return product if c is None or d is None else torch.addcmul(product, *alike(c, d))


def _affine(part: Part, x: Tensor) -> Results:
    *_, c0, c1 = part.constants
    y = x if c0 == 1 else x * c0
    return (y + c1 if y is x else y.add_(c1) if c1 != 0 else y,)


def _cat(part: Part, a: Tensor | None, b: Tensor | None) -> Results:
    a = _zeros(part, b) if a is None else a
    b = _zeros(part, a) if b is None else b
    lead = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    parts = [t if t.shape[:3] == lead else t.expand(*lead, -1) for t in alike(a, b)]
    return (torch.cat(parts, 3),)


def _zeros(part: Part, other: Tensor | None) -> Tensor:
    assert other is not None
    return other.new_zeros(()).expand(part.constants.shape)


def _slice(part: Part, x: Tensor) -> Results:
    return (x[..., part.constants.start : part.constants.stop],)


def _slice_backward(part: Part, d: Tensor) -> Results:
    start, stop, features = part.constants
    return (F.pad(d, (start, features - stop)),)


def _scale(part: Part, x: Tensor, s: Tensor) -> Results:
    factor = s if s.ndim == 0 else s.reshape(-1, *[1] * (x.ndim - 1))
    return (like(x * factor, x),)


def _view(part: Part, x: Tensor) -> Results:
    return (x.reshape(part.constants.shape),)


def _expand(part: Part, x: Tensor) -> Results:
    return (x.expand(part.constants.shape),)


def _new_zeros(part: Part, like: Tensor) -> Results:
    return (like.new_zeros(part.constants.shape, dtype=part.constants.dtype),)


def _embedding(part: Part, ids: Tensor, w: Tensor) -> Results:
    tasks, rows, features = w.shape
    if tasks == 1:
        return (F.embedding(ids, w[0]),)
    return (F.embedding(_own_rows(ids, tasks, rows), w.reshape(-1, features)),)


def _own_rows(ids: Tensor, tasks: int, rows: int) -> Tensor:
    """The ids of rows in the tables of all tasks, one below the other  # [T, N, R]"""
    first = torch.arange(0, tasks * rows, rows, device=ids.device)
    return ids + first.view(tasks, 1, 1)


def _embedding_tangent(part: Part, ids: Tensor, wt: Tensor) -> Results:
    (yt,) = _embedding(part, ids, wt)
    assert yt is not None
    padding = part.constants.padding
    return (yt if padding < 0 else yt.masked_fill_((ids == padding).unsqueeze(3), 0.0),)


def _embedding_backward(part: Part, d: Tensor, ids: Tensor) -> Results:
    padding, rows, over_tasks = part.constants
    d, tasks = wide(d), d.shape[0]
    back = torch.ops.aten.embedding_dense_backward
    if over_tasks or tasks == 1:
        return (back(d, ids.expand(tasks, -1, -1), rows, padding, False).unsqueeze(0),)
    dw = back(d, _own_rows(ids, tasks, rows), tasks * rows, -1, False).view(tasks, rows, -1)
    if padding >= 0:
        dw[:, padding].zero_()
    return (dw,)


MOVES: dict[str, TorchKernel] = {
    "add.forward": _add,
    "accumulate": lambda part, a, b: (a.add_(b),),
    "mul.forward": _mul,
    "mul.tangent": _mul_tangent,
    "mul.backward": _mul_backward,
    "affine.forward": _affine,
    "cat.forward": _cat,
    "slice.forward": _slice,
    "slice.backward": _slice_backward,
    "scale": _scale,
    "view": _view,
    "transpose": lambda part, x: (x.mT,),
    "expand": _expand,
    "stack": lambda part, *xs: (torch.stack(xs),),
    "zeros": _new_zeros,
    "embedding.forward": _embedding,
    "embedding.tangent": _embedding_tangent,
    "embedding.backward": _embedding_backward,
}
