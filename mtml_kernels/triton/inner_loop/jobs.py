"""What one launch does: jobs, each of which owns the tiles of one result and whatever goes element by element after it.

Positions (`int`) name planes of the schedule. Nothing here imports triton.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from mtml_kernels.program.layers.window import Window
from mtml_kernels.schedule.call import Part
from mtml_kernels.triton.inner_loop.pool import Panes

__all__ = ["Job", "Launch", "Operand", "Phase", "Product", "Reading", "Share", "Space", "Term", "data_of"]


class Operand(NamedTuple):
    """A plane as a kernel meets it: its name, its layout, and whether its numbers are of half precision."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Space(NamedTuple):
    """The elements of a result: [T, N, R, F] of values, [T, rows, cols] of parameters; both are [T, M, C] in tiles.

    `merged`: the tasks' rows follow each other, as one task's, where all tasks share what they are multiplied by.
    """

    shape: tuple[int, ...]
    merged: bool = False

    @property
    def tasks(self) -> int:
        """Programs do not cross tasks."""
        return 1 if self.merged else self.shape[0]

    @property
    def rows(self) -> int:
        """M"""
        return math.prod(self.shape[0 if self.merged else 1 : -1])

    @property
    def cols(self) -> int:
        """C"""
        return self.shape[-1]


class Reading(NamedTuple):
    """How a product's operand lies along rows and columns of the tile.

    way: "value" [T, N, R, F] by (row, feature); "weight" [T, rows, cols] as it is stored; of a convolution: "patch" an
    image by (point of the result, tap and channel), "spread" the result's cotangent by (pixel, tap and channel),
    "kernel" the weights by (channel out, tap and channel in), "kernel_back" by (channel in, tap and channel out).
    turned: rows and columns change places.
    """

    plane: int
    way: str
    turned: bool = False


class Term(NamedTuple):
    """left [M, K] right [K, C]"""

    left: Reading
    right: Reading


class Phase(NamedTuple):
    """Pixels (at + i stride) of an image, which meet the taps (first + j stride) of a strided window and no others."""

    at: tuple[int, int]
    size: tuple[int, int]
    first: tuple[int, int]
    taps: tuple[int, int]

    @staticmethod
    def of(window: Window) -> list[Phase]:
        """All that have pixels. Without dilation; else one phase has everything, as does a window of stride 1."""
        strides = window.stride if window.dilation == (1, 1) else (1, 1)
        found = []
        for y in range(strides[0]):
            for x in range(strides[1]):
                at = y, x
                size = tuple(-(-(n - a) // s) for n, a, s in zip(window.size, at, strides, strict=True))
                first = tuple((a + p) % s for a, p, s in zip(at, window.pad, strides, strict=True))
                taps = tuple(max(0, -(-(k - f) // s)) for k, f, s in zip(window.kernel, first, strides, strict=True))
                if min(size) > 0:
                    found.append(Phase(at, (size[0], size[1]), (first[0], first[1]), (taps[0], taps[1])))
        return found


class Product(NamedTuple):
    """The sum of terms over a depth K, plus a row: the bias. window: of a convolution; groups: of its channels."""

    terms: tuple[Term, ...]
    depth: int
    bias: int | None = None
    window: Window | None = None
    groups: int = 1
    rows_grouped: bool = False  # groups are of rows (a weight gradient), not of columns
    half: bool = False  # both operands may meet in half precision
    phase: Phase | None = None  # of a gradient by a strided window: the pixels that are rows here


class Share(NamedTuple):
    """What a job's programs leave of a part's sums over rows: a row each of a plane [numbers, T, chunks, F].

    first: the chunk of the job's first program.
    """

    part: Part
    plane: int
    first: int


# Of each row is read, of the first operands of a part:
_DATA = {
    "norm.stats": ("x",),
    "norm.sums": ("dt", "xhat"),
    "norm.stats_tangent": ("dt", "xhat"),
    "norm.sums_tangent": ("d", "dt", "xhat", "xhat_t"),
}


def data_of(part: Part) -> dict[str, int]:
    """The planes of whose rows a part takes sums, by role; none of other parts."""
    return dict(zip(_DATA.get(part.kernel, ()), part.reads, strict=False))


@dataclasses.dataclass
class Job:
    """`first`: the plane that the product, or the sum of the planes `summed` over rows, makes; None where the job is
    pointwise alone. `parts`: pointwise ones, in order; each has the shape of the space. The first may be a pooling that
    reads elsewhere. `pool`: one, in `panes`, of what they make. `shares`: of sums over what they make.

    `pieces`: into how many a product's depth or a sum's rows are cut; each has programs of its own, and `first` is
    then [T, pieces, rows, cols]. Where the sum is `of_shares`, how many such pieces every task has.
    """

    space: Space
    first: int | None = None
    product: Product | None = None
    summed: tuple[int, ...] = ()
    of_shares: bool = False  # the sum is over pieces, over tasks, or over both: in their order, task by task
    pieces: int = 1
    weighed: Part | None = None  # loss.sum, whose samples are the rows of the sum
    parts: list[Part] = dataclasses.field(default_factory=list)
    pool: Part | None = None
    shares: list[Share] = dataclasses.field(default_factory=list)

    @property
    def panes(self) -> Panes | None:
        """The windows of the pooling at its end."""
        return None if self.pool is None else Panes.of(self.pool.constants)

    @property
    def rows(self) -> int:
        """Of one task, that are its own."""
        panes = self.panes
        if panes is not None:
            return self.space.shape[1] * math.prod(panes.grid)
        phase = None if self.product is None else self.product.phase
        if phase is None or self.product is None or self.product.window is None:
            return self.space.rows
        return self.space.rows // math.prod(self.product.window.size) * math.prod(phase.size)

    @property
    def makes(self) -> set[int]:
        """Planes that it writes, or only holds."""
        made = {plane for part in self._all() for plane in part.writes if plane >= 0}
        made |= {share.plane for share in self.shares}
        return made | ({self.first} if self.first is not None else set())

    @property
    def needs(self) -> set[int]:
        """Planes that it reads and does not make."""
        read = {plane for part in self._all() for plane in part.reads if plane >= 0} | set(self.summed)
        read |= {plane for plane in (self.weighed.reads if self.weighed else ()) if plane >= 0}
        read |= {plane for share in self.shares for plane in data_of(share.part).values() if plane >= 0}
        if self.product is not None:
            read |= {reading.plane for term in self.product.terms for reading in term}
            read |= {self.product.bias} - {None}  # type: ignore[arg-type]
        return read - self.makes

    def _all(self) -> list[Part]:
        return self.parts if self.pool is None else [*self.parts, self.pool]


@dataclasses.dataclass
class Launch:
    """Jobs side by side in one grid; no job reads what another makes."""

    jobs: list[Job]

    @property
    def makes(self) -> set[int]:
        """Planes that its jobs make."""
        return {plane for job in self.jobs for plane in job.makes}

    @property
    def needs(self) -> set[int]:
        """Planes that its jobs read."""
        return {plane for job in self.jobs for plane in job.needs}
