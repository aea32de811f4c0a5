"""Clipping by the norm of a task's gradients, of all its tensors together, and the way back.

c = min(1, m / (|g| + 1e-6)), and of the cotangents h of c g, where c < 1:  v = c h - m / (|g| (|g| + 1e-6)^2) <h, g> g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schema.update import HYPERS
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.arithmetic import root
from mtml_kernels.triton.inner_loop.grid import task_and_block
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, type_of
from mtml_kernels.triton.inner_loop.sums import partial_sums, total

__all__ = ["CLIPPING", "clip_tile"]

_CLIP = HYPERS.index("clip_norm")
AT = tl.constexpr(_CLIP)
CLIP_EPS = tl.constexpr(1e-6)  # torch.nn.utils.clip_grad_norm_'s


def clip_tile(elements: int) -> int:
    """The launch policy: elements of a program, or parts of a sum that it adds at a time; 8 for each of 128 threads."""
    return power(elements, 1024)


@triton.jit
def _all_parts(parts, count, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    added = tl.zeros([BLOCK], TYPE)
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        added += tl.load(parts + p, mask=p < count, other=0.0)
    return tl.sum(added, 0)


@triton.jit
def clip_kernel(
    squares,  # [T, parts]
    hyper,  # [8]
    scale,  # [T]
    count, hyper_p, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """scale = min(1, m / (|g| + 1e-6))"""
    task = tl.program_id(0).to(tl.int64)
    norm = root(_all_parts(squares + task * count, count, BLOCK, TYPE))
    ratio = tl.load(hyper + AT * hyper_p).to(TYPE) / (norm + CLIP_EPS)
    tl.store(scale + task, tl.where(ratio > 1.0, 1.0, ratio))  # NaN stays


@triton.jit
def along_kernel(
    squares,  # [T, parts]
    products,  # [T, parts], of h and g
    hyper,  # [8]
    scale,  # [T]
    along, slope,  # [T]
    count, product_count, hyper_p, scale_t, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """along = m <h, g> / (|g| (|g| + 1e-6)^2) and slope = <h, g> / (|g| + 1e-6), 0 where nothing was clipped."""
    task = tl.program_id(0).to(tl.int64)
    norm = root(_all_parts(squares + task * count, count, BLOCK, TYPE))
    inner = _all_parts(products + task * product_count, product_count, BLOCK, TYPE)
    divisor = norm + CLIP_EPS
    active = tl.load(scale + task * scale_t).to(TYPE) != 1.0
    found = tl.load(hyper + AT * hyper_p).to(TYPE) * inner / (norm * divisor * divisor)
    tl.store(along + task, tl.where(active & (norm != 0), found, 0.0))
    tl.store(slope + task, tl.where(active, inner / divisor, 0.0))


@triton.jit
def unclip_kernel(
    h, g,  # [T, P]
    scale, along,  # [T]
    v,  # [T, P]
    P, h_t, h_p, g_t, g_p, scale_t,
    HAS_H: tl.constexpr, HAS_G: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """v = scale h - along g"""
    task, block = task_and_block(tl.cdiv(P, BLOCK))
    p = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], TYPE)
    if HAS_H:
        own = tl.load(h + task * h_t + p * h_p, mask=p < P, other=0.0).to(TYPE)
        found = own * tl.load(scale + task * scale_t).to(TYPE)
    if HAS_G:
        own = tl.load(g + task * g_t + p * g_p, mask=p < P, other=0.0).to(TYPE)
        found -= own * tl.load(along + task)
    tl.store(v + task * P + p, found, mask=p < P)


def _parts(pairs: Sequence[tuple[Tensor, Tensor]], tasks: int) -> Tensor:
    """Sums of products, over chunks of the elements of all pairs  # [T, parts]"""
    return torch.cat([partial_sums(a, b).expand(tasks, -1) for a, b in pairs], 1)


def _clip(part: Part, hyper: Tensor, *gs: Tensor | None) -> Results:
    own = [g for g in gs if g is not None]
    tasks = max(g.shape[0] for g in own)
    squares = _parts([(g, g) for g in own], tasks)
    scale = new((tasks,), squares)
    if tasks:
        with on(scale.device):
            clip_kernel[(tasks,)](
                squares, hyper, scale, squares.shape[1], hyper.stride(0), clip_tile(squares.shape[1]),
                type_of(squares), **OPTIONS,
            )  # fmt: skip
    return (scale,)


def _unclip(part: Part, hyper: Tensor, scale: Tensor, *both: Tensor | None) -> Results:
    hs, gs = both[: part.constants], both[part.constants :]
    tasks = max(t.shape[0] for t in (scale, *both) if t is not None)
    squares = _parts([(g, g) for g in gs if g is not None], tasks)
    pairs = [(h, g) for h, g in zip(hs, gs, strict=True) if h is not None and g is not None]
    products = _parts(pairs, tasks) if pairs else new((tasks, 1), squares).zero_()
    along, slope = new((tasks,), squares), new((tasks,), squares)
    scale = scale.expand(tasks)
    if tasks:
        most = max(squares.shape[1], products.shape[1])
        with on(scale.device):
            along_kernel[(tasks,)](
                squares, products, hyper, scale, along, slope, squares.shape[1], products.shape[1], hyper.stride(0),
                scale.stride(0), clip_tile(most), type_of(squares), **OPTIONS,
            )  # fmt: skip
    vs = [_back(h, g, scale, along) if want else None for h, g, want in zip(hs, gs, part.wants[:-1], strict=True)]
    if not part.wants[-1]:
        return *vs, None
    dhyper = total((1,), slope).to(hyper.dtype)
    return *vs, F.pad(dhyper, (_CLIP, len(HYPERS) - 1 - _CLIP))


def _back(h: Tensor | None, g: Tensor | None, scale: Tensor, along: Tensor) -> Tensor | None:
    """scale h - along g"""
    like = h if g is None else g
    if like is None:
        return None
    tasks, elements = len(along), like.shape[1] * like.shape[2]
    v = new((tasks, *like.shape[1:]), like)
    if v.numel():
        of_h, of_g = (like.flatten(1) if t is None else t.flatten(1).expand(tasks, -1) for t in (h, g))
        block = clip_tile(elements)
        with on(v.device):
            unclip_kernel[(tasks * -(-elements // block),)](
                of_h, of_g, scale, along, v, elements, *of_h.stride(), *of_g.stride(), scale.stride(0),
                h is not None, g is not None, block, type_of(v), **OPTIONS,
            )  # fmt: skip
    return v


CLIPPING: dict[str, Any] = {
    "update.clip": _clip,
    "update.unclip": _unclip,
}
