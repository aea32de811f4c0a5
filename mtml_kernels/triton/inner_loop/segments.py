"""Several tensors of all tasks in one launch: each program takes a block of the elements of one of them.

A tensor is rows [T, P] of elements, and the blocks of a task's tensors follow each other. Pointers come as tuples,
sizes and strides as literals; a program finds its own by comparing the number of its block with where each tensor
begins. All of this is of one task's shapes: another number of tasks is the same code, and the same bits for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from mtml_kernels.triton.inner_loop.operands import power

__all__ = ["MOST", "Role", "Segments", "address", "batches", "chosen", "place", "pointers", "role"]

MOST = 24  # tensors of a launch: with 16 pointers each, 3 of the 4 KB that a launch's arguments may take
Item = TypeVar("Item")


@triton.jit
def chosen(items, block, FIRSTS: tl.constexpr):
    """The entry of the tensor that has a block."""
    found = items[0]
    for i in tl.static_range(1, len(FIRSTS)):
        found = tl.where(block >= FIRSTS[i], items[i], found)
    return found


@triton.jit
def place(SIZES: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's task, for offsets in 64 bits, its block among the task's, and of its tensor the elements and P."""
    program = tl.program_id(0)
    block = program % BLOCKS
    p = (block - chosen(FIRSTS, block, FIRSTS)) * BLOCK + tl.arange(0, BLOCK)
    return (program // BLOCKS).to(tl.int64), block, p, chosen(SIZES, block, FIRSTS)


@triton.jit
def address(tensors, STEPS: tl.constexpr, task, block, p, FIRSTS: tl.constexpr):
    """Of elements p of a task, in a role's tensor that has a block."""
    at = task * chosen(STEPS[0], block, FIRSTS) + p * chosen(STEPS[1], block, FIRSTS)
    return chosen(tensors, block, FIRSTS) + at


class Segments(NamedTuple):
    """Where each of a task's tensors lies among its blocks: the constants of a launch, but for the number of tasks."""

    sizes: tuple[int, ...]  # P of each
    firsts: tuple[int, ...]  # its first block
    blocks: int  # of a task
    block: int  # elements of one

    @staticmethod
    def of(sizes: Sequence[int], most: int) -> Segments:
        """Blocks of up to `most` elements, a power of two that the largest tensor fills; one where there are none."""
        block = power(max(sizes), most)
        *firsts, blocks = itertools.accumulate((-(-size // block) for size in sizes), initial=0)
        return Segments(tuple(sizes), tuple(firsts), max(blocks, 1), block)


class Role(NamedTuple):
    """One operand of each tensor: its memory, and its strides from task to task and from element to element."""

    tensors: tuple[Tensor, ...]
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    there: bool  # whether any is


def role(operands: Sequence[Tensor | None], like: Sequence[Tensor]) -> Role:
    """Of tensors [T or 1, *shape], or [1 or T, 1, ...] or [] for one number to a task; what is absent is zero.

    like: of each the tensor [T, *shape] whose elements they are.
    """
    if all(t is None for t in operands):
        none = (0,) * len(like)
        return Role(tuple(like), (none, none), False)
    rows = [_rows(own.new_zeros(()) if t is None else t) for t, own in zip(operands, like, strict=True)]
    by_task = tuple(t.stride(0) if len(t) > 1 else 0 for t in rows)
    return Role(tuple(rows), (by_task, tuple(map(_by_element, rows, like))), True)


def _rows(t: Tensor) -> Tensor:
    return t.flatten(1) if t.ndim else t.view(1, 1)


def _by_element(rows: Tensor, own: Tensor) -> int:
    """1 of a single element too: neighbours are loaded in whole words where all strides are 1."""
    if rows.shape[1] > 1:
        return rows.stride(1)
    return 0 if own.shape[1:].numel() > 1 else 1


def batches(tensors: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """What goes into one launch, and the next, of what there is for each tensor."""
    return (tensors[at : at + MOST] for at in range(0, len(tensors), MOST))


def pointers(results: Sequence[Sequence[Tensor]], roles: int) -> list[tuple[Tensor, ...]]:
    """Memory of results by role; of roles that a rule has not, some memory that is not touched."""
    found: list[Any] = list(zip(*results, strict=True))
    return [*found, *[found[0]] * (roles - len(found))]
