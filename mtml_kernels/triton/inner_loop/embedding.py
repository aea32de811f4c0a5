"""Embeddings: rows of a table, and the gradients of rows added up in the order of the samples."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Table
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, type_of

__all__ = ["EMBEDDING", "lookup_tile", "segment_tile"]


def lookup_tile(rows: int, features: int) -> tuple[int, int]:
    """The launch policy of the way there: rows and features of a program, 1024 numbers, whole rows first.

    They are loads and stores alone: 8 numbers for each of 128 threads. Of one task's shape alone.
    """
    cols = power(features, 1024)
    return power(rows, 1024 // cols), cols


def segment_tile(features: int) -> tuple[int, int]:
    """The launch policy of the way back: equal ids that are added up at a time, and features.

    Most ids of a task stand there a few times: 8 at a time, of up to 128 features. Reasoned, not yet measured.
    """
    return 8, power(features, 128)


@triton.jit
def lookup_kernel(
    ids,  # [T, M]
    w,  # [T, V, F]
    y,  # [T, M, F]
    M, V, F, ids_t, ids_m, w_t, w_v, w_f, padding,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y[m] = w[ids[m]], 0 for `padding`; an id out of range is never an index, its row is NaN."""
    task, block = task_and_block(tl.cdiv(M, ROWS))
    m = block * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    row = tl.load(ids + task * ids_t + m * ids_m, mask=m < M, other=0).to(tl.int64)[:, None]
    known = (row >= 0) & (row < V)
    live = (m < M)[:, None] & (f < F)
    value = tl.load(w + task * w_t + row * w_v + f * w_f, mask=live & known & (row != padding), other=0.0)
    value = tl.where(known, value, float("nan")).to(value.dtype)
    tl.store(y + (task * M + m.to(tl.int64)[:, None]) * F + f, value, mask=live)


@triton.jit
def segment_kernel(
    d,  # [T, M, F]
    ids, order,  # [T, M]: ids in order, and where in d they stand
    dw,  # [T, V, F]
    M, V, F, d_t, d_m, d_f, padding,
    ROWS: tl.constexpr, COLS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """dw[ids[i]] = sum of d[order[j]] over the equal ids from i on, by the program whose i is the first of them."""
    task, i = task_and_block(M)
    f = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ids += task * M
    order += task * M
    own = tl.load(ids + i)
    before = tl.load(ids + tl.maximum(i - 1, 0))
    going = (((own != before) | (i == 0)) & (own >= 0) & (own < V) & (own != padding)).to(tl.int32)
    first = going
    added = tl.zeros([COLS], TYPE)
    while going > 0:
        j = i + tl.arange(0, ROWS)
        same = (j < M) & (tl.load(ids + j, mask=j < M, other=-1) == own)
        row = tl.load(order + j, mask=same, other=0)[:, None]
        d_at = d + task * d_t + row * d_m + f[None, :] * d_f
        added += tl.sum(tl.load(d_at, mask=same[:, None] & (f < F)[None, :], other=0.0).to(TYPE), 0)
        going = tl.min(same.to(tl.int32), 0)
        i += ROWS
    tl.store(dw + (task * V + own) * F + f, added, mask=f < tl.where(first > 0, F, 0))


def _looked_up(ids: Tensor, w: Tensor, padding: int) -> Tensor:
    tasks = max(ids.shape[0], w.shape[0])
    samples, rows = ids.shape[1:]
    y = new((tasks, samples, rows, w.shape[2]), w, w.dtype)
    if y.numel():
        flat, table = ids.flatten(1).expand(tasks, -1), w.expand(tasks, -1, -1)
        height, cols = lookup_tile(samples * rows, w.shape[2])
        with on(w.device):
            lookup_kernel[(tasks * -(-samples * rows // height), -(-w.shape[2] // cols))](
                flat, table, y, samples * rows, w.shape[1], w.shape[2], *flat.stride(), *table.stride(), padding,
                height, cols, **OPTIONS,
            )  # fmt: skip
    return y


def _forward(part: Part, ids: Tensor, w: Tensor) -> Results:
    return (_looked_up(ids, w, -1),)


def _tangent(part: Part, ids: Tensor, wt: Tensor) -> Results:
    return (_looked_up(ids, wt, part.constants.padding),)


def _backward(part: Part, d: Tensor, ids: Tensor) -> Results:
    given: Table = part.constants
    tasks, features = d.shape[0], d.shape[3]
    flat, own = d.flatten(1, 2), ids.flatten(1).expand(tasks, -1)
    if given.over_tasks:
        tasks, flat, own = 1, flat.reshape(1, -1, features), own.reshape(1, -1)
    dw = new((tasks, given.rows, features), d).zero_()
    if flat.numel():
        ordered, order = torch.sort(own, dim=1, stable=True)
        count, (rows, cols) = own.shape[1], segment_tile(features)
        with on(d.device):
            segment_kernel[(tasks * count, -(-features // cols))](
                flat, ordered, order, dw, count, given.rows, features, *flat.stride(), given.padding,
                rows, cols, type_of(d), **OPTIONS,
            )  # fmt: skip
    return (dw,)


EMBEDDING: dict[str, Any] = {
    "embedding.forward": _forward,
    "embedding.tangent": _tangent,
    "embedding.backward": _backward,
}
