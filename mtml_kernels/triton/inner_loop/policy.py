"""The launch policy of the schedule's products and pointwise jobs."""

from __future__ import annotations

import math
from typing import NamedTuple

from mtml_kernels.triton.inner_loop.jobs import Job, Product

__all__ = ["LARGEST", "WARPS", "Tile", "blocks", "depth_of_piece", "pieces_of", "programs", "shared_tile", "tile_of"]

WARPS = 4
SMALLEST = 16  # of a side of tl.dot
LARGEST = 64
ELEMENTS = 1024  # of a pointwise tile: 8 a thread
SAMPLES = 256  # of a task's loss at a time: two a thread
SHARES = 1024  # of a task's sums, at most: few enough for the programs that add them up
PROGRAMS = 256  # of a task's gradient, about: two for each multiprocessor of the largest chips
TURNS = 8, 64  # of a program's loop over a piece of the depth, at least and about at most
ADDED = 8, 32  # shares of a sum that a program has at hand at a time, at least and at most


class Tile(NamedTuple):
    """Rows and columns of a tile, and the block of the depth; how many of them, row by row, a program takes."""

    rows: int
    cols: int
    depth: int
    repeat: int = 1

    @property
    def chunk(self) -> int:
        """Rows of a program."""
        return self.rows * self.repeat


def power(n: int, least: int, most: int) -> int:
    """The next power of two within bounds."""
    found = least
    while found < n and found < most:
        found *= 2
    return found


def shared_tile(job: Job, dtype: str) -> Tile:
    """The tile of a job that stores shares: as many one after another as leave `SHARES` of a task's rows.

    Not of products, whose loop over the depth in another loop spills: one tile, be it too many shares.
    """
    tile = _tile(job, dtype)
    if job.product is not None:
        return tile
    return tile._replace(repeat=power(-(-job.rows // (tile.rows * SHARES)), 1, job.rows))


def tile_of(job: Job, dtype: str) -> Tile:
    """The tile of a job."""
    return shared_tile(job, dtype) if job.shares else _tile(job, dtype)


def _tile(job: Job, dtype: str) -> Tile:
    """By the shape of one task's result alone, also where the rows of all tasks are one matrix: the same bits whatever
    tasks stand beside.

    Products: up to 64 x 64 with a depth of 32, or of 16 where there is less: 9 taps of 3 channels in one block spill,
    in two they take 96 registers. Of 16, too, for the weights of a convolution, whose pixels are found anew in every
    turn: 64 x 576 takes 179 registers on sm_80, where 32 spill, and 112 on sm_90. Few-shot rows (5 or 10 of a support
    set) fill 16, which use the matrix units' smaller shape; 64 rows are what sm_90's larger one takes. Two blocks of
    operands in three stages are 48 KB of shared memory, which sm_120's 99 KB hold. Doubles are two words: 32 x 32.
    Sums over rows: 64 rows at a time, up to 64 columns. Pointwise: about 1024 elements, whole rows first; of what is
    pooled as many windows. Sums of shares: 2048 numbers at a time, of 8 to 32 shares. Reasoned, not yet measured.
    """
    space = job.space
    if job.product is not None:
        most = LARGEST if dtype == "tl.float32" else 32
        own_rows, own_cols = _own(job)
        own_rows //= max(space.shape[0], 1) if space.merged else 1
        rows, cols = power(own_rows, SMALLEST, most), power(own_cols, SMALLEST, most)
        return Tile(rows, cols, 16 if job.product.depth < 32 or _of_pixels(job.product) else 32)
    if job.weighed is not None:
        return Tile(1, 1, SAMPLES)
    if job.summed and not job.of_shares:
        return Tile(1, power(space.cols, 1, LARGEST), LARGEST)
    at_once = power(job.pieces, *ADDED) if job.of_shares else 1
    elements = 2 * ELEMENTS // at_once if job.of_shares else ELEMENTS
    cols = power(space.cols, 1, min(128, elements))
    return Tile(power(job.rows, 1, elements // cols), cols, at_once)


def _of_pixels(product: Product) -> bool:
    """Whether it goes along the pixels of an image: the gradient of a convolution's weights."""
    return any(term.right.way == "patch_by_weight" for term in product.terms)


def pieces_of(job: Job, dtype: str, depth: int, read: int) -> int:
    """Into how many pieces the depth of a gradient is cut, of which one task's operands have `read` numbers.

    As many as make a task's programs `PROGRAMS`, with `TURNS` each. A turn takes about a microsecond, be it of 64 x 64
    x 32 multiply-adds or of 32 x 32 where pixels have to be found, and a launch that adds pieces up takes 5: what has
    16 turns gains 3. At most as many as have a quarter of the operands' numbers, so that storing and reading them
    is half of what is read anyway. By the turns of compiled kernels, not measured.
    """
    tile = tile_of(job, dtype)
    groups = job.product.groups if job.product is not None else 1
    tiles = groups * math.prod(blocks(job, tile))
    loops = len(job.product.terms) if job.product is not None else len(job.summed)
    turns = loops * -(-depth // tile.depth)
    own = min(max(turns * tiles // PROGRAMS, TURNS[0]), TURNS[1])
    most = min(turns // own, read // max(4 * job.rows * job.space.cols, 1))
    return -(-depth // depth_of_piece(depth, most, tile.depth)) if most > 1 else 1


def depth_of_piece(depth: int, pieces: int, block: int) -> int:
    """Of every piece but the last: whole blocks, but for what is in one piece."""
    return depth if pieces == 1 else -(-depth // (pieces * block)) * block


def _own(job: Job) -> tuple[int, int]:
    """Rows and columns of one group of channels, which tiles do not cross."""
    rows, cols = job.rows, job.space.cols
    if job.product is None:
        return rows, cols
    groups = job.product.groups
    return (rows // groups, cols) if job.product.rows_grouped else (rows, cols // groups)


def blocks(job: Job, tile: Tile) -> tuple[int, int]:
    """How many programs one group of one task's result takes, by rows and columns."""
    rows, cols = _own(job)
    return -(-rows // tile.chunk), -(-cols // tile.cols)


def programs(job: Job, tile: Tile) -> int:
    """How many programs a job takes."""
    groups = 1 if job.product is None else job.product.groups
    by_rows, by_cols = blocks(job, tile)
    return job.space.tasks * (1 if job.of_shares else job.pieces) * groups * by_rows * by_cols
