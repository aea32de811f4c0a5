"""The loss of a task, sum_n c_n l_n (`loss_kernels`), and the weights c of samples (`loss_weights`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Loss
from mtml_kernels.schedule.torch_kernels.common import wide_dtype
from mtml_kernels.schema.losses import KINDS, SOFT
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.loss_kernels import DATA, FORWARD, TANGENT, class_kernel, element_kernel
from mtml_kernels.triton.inner_loop.loss_weights import mean_kernel, sample_tile, weights_back_kernel, weights_kernel
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, strides, type_of

__all__ = ["LOSSES", "loss_tile"]

_IDS = KINDS.index("cross_entropy")


def loss_tile(samples: int, elements: int) -> tuple[int, int]:
    """The launch policy: samples of a program, and their elements at a time.

    512 numbers at a time, 4 for each of 128 threads: 75 samples of 5 classes are two programs of 64 rows, 5 are one,
    and a launch costs more than either. Of one task's shape alone. Reasoned, not yet measured.
    """
    cols = power(elements, 512)
    return power(samples, 512 // cols), cols


class _Rows(NamedTuple):
    """z, zt and the target as rows of samples: [T, N, E], of class ids [T, N, 1]; c [T, N], seed [T]."""

    z: Tensor
    zt: Tensor | None
    y: Tensor
    c: Tensor | None
    seed: Tensor | None

    @staticmethod
    def of(given: Loss, z: Tensor, zt: Tensor | None, target: Tensor, c: Tensor | None, seed: Tensor | None) -> _Rows:
        """Every operand for all tasks."""
        tasks = max(t.shape[0] for t in (z, zt, target, c, seed) if t is not None)
        own = z.flatten(2)
        y = target.reshape(*target.shape[:2], 1 if given.kind == _IDS else own.shape[2])
        moved = None if zt is None else zt.flatten(2)
        return _Rows(*(None if t is None else t.expand(tasks, *t.shape[1:]) for t in (own, moved, y, c, seed)))  # type: ignore[arg-type]


def _launch(given: Loss, mode: tl.constexpr, rows: _Rows, row: Tensor | None, grad: Tensor | None) -> None:
    tasks, samples, elements = rows.z.shape
    size, cols = loss_tile(samples, elements)
    classes = given.kind in (_IDS, SOFT)
    kernel = class_kernel if classes else element_kernel
    dims = (3, 3, 3, 2, 1)
    with on(rows.z.device):
        kernel[(tasks * -(-samples // size),)](
            *(rows.z if t is None else t for t in (*rows, row, grad)), samples, elements,
            *(step for t, many in zip(rows, dims, strict=True) for step in strides(t, many)),
            mode.value, given.kind == _IDS if classes else given.kind, given.p0, given.total,
            *(t is not None for t in (rows.zt, rows.c, rows.seed, row, grad)), size, cols, type_of(rows.z), **OPTIONS,
        )  # fmt: skip


def _forward(part: Part, z: Tensor, target: Tensor, c: Tensor | None) -> Results:
    rows = _Rows.of(part.constants, z, None, target, c, None)
    each = new(rows.z.shape[:2], z) if part.wants[0] else None
    d = new((len(rows.z), *z.shape[1:]), z, z.dtype) if part.wants[1] else None
    if rows.z.numel() and not (each is d is None):
        _launch(part.constants, FORWARD, rows, each, d)
    return each, d


def _tangent(
    part: Part, z: Tensor, zt: Tensor | None, target: Tensor, c: Tensor | None, seed: Tensor | None
) -> Results:  # fmt: skip
    rows = _Rows.of(part.constants, z, zt, target, c, seed)
    dt = new((len(rows.z), *z.shape[1:]), z, z.dtype)
    if dt.numel():
        _launch(part.constants, TANGENT, rows, None, dt)
    return (dt,)


def _data(
    part: Part, z: Tensor, zt: Tensor | None, target: Tensor, c: Tensor | None, seed: Tensor | None
) -> Results:  # fmt: skip
    rows = _Rows.of(part.constants, z, zt, target, c, seed)
    dtarget = new((len(rows.z), *target.shape[1:]), target, target.dtype) if part.wants[0] else None
    dc = new(rows.z.shape[:2], z) if part.wants[1] and not (zt is seed is None) else None
    if rows.z.numel() and not (dtarget is dc is None):
        _launch(part.constants, DATA, rows, dc, dtarget)
    return dtarget, dc


def _ids(target: Tensor | None, tasks: int) -> Tensor | None:
    """Class ids [T, N], or nothing."""
    return None if target is None or target.is_floating_point() else target.flatten(1).expand(tasks, -1)


def _sum(part: Part, each: Tensor, c: Tensor | None) -> Results:
    tasks = max(t.shape[0] for t in (each, c) if t is not None)
    samples = each.shape[1]
    each, own = each.expand(tasks, -1), None if c is None else c.expand(tasks, -1)
    y = new((tasks,), each)
    if not samples:  # PyTorch's mean of nothing
        return (y.fill_(0.0 if c is not None or part.constants.total else float("nan")),)
    if tasks:
        with on(each.device):
            mean_kernel[(tasks,)](
                each, each if own is None else own, y, samples, *each.stride(), *strides(own, 2), own is not None,
                own is None and not part.constants.total, sample_tile(samples), type_of(each), **OPTIONS,
            )  # fmt: skip
    return (y,)


def _weights(part: Part, mask: Tensor | None, target: Tensor | None) -> Results:
    given: Loss = part.constants
    tasks = max(t.shape[0] for t in (mask, target) if t is not None)
    own, ids = None if mask is None else mask.expand(tasks, -1), _ids(target, tasks)
    like = ids if own is None else own
    assert like is not None
    dtype = given.dtype if own is None else wide_dtype(own.dtype)
    c, total = new(like.shape, like, dtype), new((tasks,), like, dtype)
    if not c.numel():
        return c, total.zero_()
    with on(c.device):
        weights_kernel[(tasks,)](
            c if own is None else own, c if ids is None else ids, c, total, c.shape[1], *strides(own, 2),
            *strides(ids, 2), own is not None, ids is not None, given.total, sample_tile(c.shape[1]), type_of(c),
            **OPTIONS,
        )  # fmt: skip
    return c, total


def _weights_backward(
    part: Part, dc: Tensor, c: Tensor | None, total: Tensor | None, target: Tensor | None
) -> Results:  # fmt: skip
    tasks = max(t.shape[0] for t in (dc, c, total, target) if t is not None)
    dc, own = dc.expand(tasks, -1), None if c is None else c.expand(tasks, -1)
    norm, ids = None if total is None else total.expand(tasks), _ids(target, tasks)
    dmask = new(dc.shape, dc)
    if dmask.numel():
        with on(dc.device):
            weights_back_kernel[(tasks,)](
                dc, *(dc if t is None else t for t in (own, norm, ids)), dmask, dc.shape[1], *dc.stride(),
                *strides(own, 2), *strides(norm, 1), *strides(ids, 2), ids is not None, part.constants.total,
                sample_tile(dc.shape[1]), type_of(dc), **OPTIONS,
            )  # fmt: skip
    return (dmask,)


LOSSES: dict[str, Any] = {
    "loss.forward": _forward,
    "loss.tangent": _tangent,
    "loss.data": _data,
    "loss.sum": _sum,
    "weights.forward": _weights,
    "weights.backward": _weights_backward,
}
