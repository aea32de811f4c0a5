"""Clipping by the norm of a task's gradients, of all its tensors together, and the way back.

c = min(1, m / (|g| + 1e-6)), and of the cotangents h of c g, where c < 1:  v = c h - m / (|g| (|g| + 1e-6)^2) <h, g> g

Two launches each: sums over blocks of all tensors, then what is made of them. That adds a task's sums up in every one
of its programs, in one order, which is cheaper than a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.schedule.call import Part
from mtml_kernels.schema.update import HYPERS
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop.arithmetic import root
from mtml_kernels.triton.inner_loop.operands import OPTIONS, Results, new, power, type_of
from mtml_kernels.triton.inner_loop.segments import Role, Segments, address, batches, chosen, place, role
from mtml_kernels.triton.inner_loop.sums import total

__all__ = ["CLIPPING"]

_CLIP = HYPERS.index("clip_norm")
AT = tl.constexpr(_CLIP)
CLIP_EPS = tl.constexpr(1e-6)  # torch.nn.utils.clip_grad_norm_'s
MOST_ELEMENTS = 1024  # of a program, or parts of a sum that it adds at a time: 8 for each of 128 threads; not measured


@triton.jit
def sums_kernel(
    h, g,  # of each tensor [T, P]
    squares, products,  # [T, all blocks], of which this launch writes some
    all_blocks,
    STEPS: tl.constexpr,  # of h and g
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    HAS_H: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """squares = sum g^2 and PRODUCTS: products = sum h g, over a block of a tensor"""
    task, block, p, P = place(SIZES, FIRSTS, BLOCKS, BLOCK)
    own = tl.load(address(g, STEPS[1], task, block, p, FIRSTS), mask=p < P, other=0.0).to(TYPE)
    tl.store(squares + task * all_blocks + block, tl.sum(own * own, 0))
    if PRODUCTS:
        other = tl.load(address(h, STEPS[0], task, block, p, FIRSTS), mask=(p < P) & HAS_H, other=0.0).to(TYPE)
        tl.store(products + task * all_blocks + block, tl.sum(own * other, 0))


@triton.jit
def _all_blocks(parts, count: tl.constexpr, LANES: tl.constexpr, TYPE: tl.constexpr):
    added = tl.zeros([LANES], TYPE)
    for first in range(0, count, LANES):
        i = first + tl.arange(0, LANES)
        added += tl.load(parts + i, mask=i < count, other=0.0)
    return tl.sum(added, 0)


@triton.jit
def clip_kernel(
    g,  # of each tensor [T, P]
    squares,  # [T, all blocks]
    hyper,  # [8]
    scale,  # [T]
    y,  # [T, P]
    hyper_p,
    STEPS: tl.constexpr,  # of g
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, WANT_SCALE: tl.constexpr,
):  # fmt: skip
    """scale = min(1, m / (|g| + 1e-6)), y = scale g"""
    task, block, p, P = place(SIZES, FIRSTS, BLOCKS, BLOCK)
    norm = root(_all_blocks(squares + task * COUNT, COUNT, LANES, TYPE))
    ratio = tl.load(hyper + AT * hyper_p).to(TYPE) / (norm + CLIP_EPS)
    factor = tl.where(ratio > 1.0, 1.0, ratio)  # NaN stays
    own = tl.load(address(g, STEPS[0], task, block, p, FIRSTS), mask=p < P, other=0.0).to(TYPE)
    tl.store(chosen(y, block, FIRSTS) + task * P + p, own * factor, mask=p < P)
    if WANT_SCALE:
        if block == 0:
            tl.store(scale + task, factor)


@triton.jit
def unclip_kernel(
    h, g,  # of each tensor [T, P]
    squares, products,  # [T, all blocks]
    hyper,  # [8]
    scale,  # [T]
    slope,  # [T]
    v,  # [T, P]
    hyper_p, scale_t,
    STEPS: tl.constexpr,  # of h and g
    SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, HAS_H: tl.constexpr, WANT_SLOPE: tl.constexpr,
):  # fmt: skip
    """v = scale h - along g with along = m <h, g> / (|g| (|g| + 1e-6)^2), and slope = <h, g> / (|g| + 1e-6): along and
    slope are 0 where nothing was clipped.
    """
    task, block, p, P = place(SIZES, FIRSTS, BLOCKS, BLOCK)
    norm = root(_all_blocks(squares + task * COUNT, COUNT, LANES, TYPE))
    inner = _all_blocks(products + task * COUNT, COUNT, LANES, TYPE)
    divisor, factor = norm + CLIP_EPS, tl.load(scale + task * scale_t).to(TYPE)
    active = factor != 1.0
    along = tl.load(hyper + AT * hyper_p).to(TYPE) * inner / (norm * divisor * divisor)
    own = tl.load(address(g, STEPS[1], task, block, p, FIRSTS), mask=p < P, other=0.0).to(TYPE)
    found = -own * tl.where(active & (norm != 0), along, 0.0)
    if HAS_H:
        found += tl.load(address(h, STEPS[0], task, block, p, FIRSTS), mask=p < P, other=0.0).to(TYPE) * factor
    tl.store(chosen(v, block, FIRSTS) + task * P + p, found, mask=p < P)
    if WANT_SLOPE:
        if block == 0:
            tl.store(slope + task, tl.where(active, inner / divisor, 0.0))


class _Batch:
    """The tensors of one launch: their cotangents h, their gradients g, results like these."""

    def __init__(self, pairs: Sequence[tuple[Tensor | None, Tensor]], tasks: int, first: int) -> None:
        like = [g for _, g in pairs]
        self.segments = Segments.of([g.shape[1:].numel() for g in like], MOST_ELEMENTS)
        self.grid, self.first, self._type = (tasks * self.segments.blocks,), first, type_of(like[0])
        self.h, self.g = (role([pair[i] for pair in pairs], like) for i in (0, 1))
        self.results = tuple(new((tasks, *g.shape[1:]), g) for g in like)

    def constants(self, *roles: Role) -> tuple[Any, ...]:
        """What the kernels know of them."""
        return tuple(each.steps for each in roles), *self.segments, self._type


class _Clipping:
    """The gradients of a task, and sums over their blocks."""

    def __init__(self, hs: Sequence[Tensor | None], gs: Sequence[Tensor], tasks: int, products: bool) -> None:
        self.batches: list[_Batch] = []
        blocks = 0
        for pairs in batches(list(zip(hs, gs, strict=True))):
            self.batches.append(_Batch(pairs, tasks, blocks))
            blocks += self.batches[-1].segments.blocks
        self.squares = new((tasks, blocks), gs[0])  # [T, blocks of all tensors]
        self.products = new((tasks, blocks), gs[0]) if products else self.squares
        self.count = blocks, power(blocks, MOST_ELEMENTS)
        self.results = [result for batch in self.batches for result in batch.results]
        for batch in self.batches if tasks else ():
            self._add_up(batch, products)

    def _add_up(self, batch: _Batch, products: bool) -> None:
        with on(self.squares.device):
            sums_kernel[batch.grid](
                batch.h.tensors, batch.g.tensors, self.squares[:, batch.first :], self.products[:, batch.first :],
                self.squares.shape[1], *batch.constants(batch.h, batch.g), batch.h.there, products, **OPTIONS,
            )  # fmt: skip


def _clip(part: Part, hyper: Tensor, *gs: Tensor | None) -> Results:
    own = [g for g in gs if g is not None]
    tasks = max(g.shape[0] for g in own)
    found = _Clipping([None] * len(own), own, tasks, products=False)
    scale = new((tasks,), found.squares)
    for i, batch in enumerate(found.batches if tasks else ()):
        with on(scale.device):
            clip_kernel[batch.grid](
                batch.g.tensors, found.squares, hyper, scale, batch.results, hyper.stride(0),
                *batch.constants(batch.g), *found.count, i == 0, **OPTIONS,
            )  # fmt: skip
    results = iter(found.results)
    return scale, *(None if g is None else next(results) for g in gs)


def _unclip(part: Part, hyper: Tensor, scale: Tensor, *both: Tensor | None) -> Results:
    hs, gs = both[: part.constants], [g for g in both[part.constants :] if g is not None]
    tasks = max(t.shape[0] for t in (scale, *both) if t is not None)
    found = _Clipping(hs, gs, tasks, products=True)
    slope, scale = new((tasks,), found.squares), scale.expand(tasks)
    for i, batch in enumerate(found.batches if tasks else ()):
        with on(scale.device):
            unclip_kernel[batch.grid](
                batch.h.tensors, batch.g.tensors, found.squares, found.products, hyper, scale, slope, batch.results,
                hyper.stride(0), scale.stride(0), *batch.constants(batch.h, batch.g), *found.count, batch.h.there,
                i == 0, **OPTIONS,
            )  # fmt: skip
    if not part.wants[-1]:
        return *found.results, None
    dhyper = total((1,), slope).to(hyper.dtype)
    return *found.results, F.pad(dhyper, (_CLIP, len(HYPERS) - 1 - _CLIP))


CLIPPING: dict[str, Any] = {
    "update.clip": _clip,
    "update.unclip": _unclip,
}
