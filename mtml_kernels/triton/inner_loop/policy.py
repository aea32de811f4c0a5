"""The launch policy of the schedule's products and pointwise jobs."""

from __future__ import annotations

from typing import NamedTuple

from mtml_kernels.triton.inner_loop.jobs import Job

__all__ = ["LARGEST", "WARPS", "Tile", "blocks", "programs", "shared_tile", "tile_of"]

WARPS = 4
SMALLEST = 16  # of a side of tl.dot
LARGEST = 64
ELEMENTS = 1024  # of a pointwise tile: 8 a thread
SAMPLES = 256  # of a task's loss at a time: two a thread
SHARES = 1024  # of a task's sums, at most: few enough for the programs that add them up


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
    in two they take 96 registers. Few-shot rows (5 or 10 of a support set) fill 16, which use the matrix units' smaller
    shape; 64 rows are what sm_90's larger one takes. Two blocks of operands in three stages are 48 KB of shared memory,
    which sm_120's 99 KB hold. Doubles are two words: 32 x 32.
    Sums over rows: 64 rows at a time, up to 64 columns. Pointwise, and sums over tasks: about 1024 elements, whole rows
    first; of what is pooled as many windows. Reasoned, not yet measured.
    """
    space = job.space
    if job.product is not None:
        most = LARGEST if dtype == "tl.float32" else 32
        own_rows, own_cols = _own(job)
        own_rows //= space.shape[0] if space.merged else 1
        rows, cols = power(own_rows, SMALLEST, most), power(own_cols, SMALLEST, most)
        return Tile(rows, cols, 16 if job.product.depth < 32 else 32)
    if job.weighed is not None:
        return Tile(1, 1, SAMPLES)
    if job.summed and not job.over_tasks:
        return Tile(1, power(space.cols, 1, LARGEST), LARGEST)
    cols = power(space.cols, 1, 128)
    return Tile(power(job.rows, 1, ELEMENTS // cols), cols, 1)


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
    return job.space.tasks * groups * by_rows * by_cols
