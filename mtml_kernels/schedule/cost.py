"""FLOPs and bytes of parts and calls, counted from their kernels, their constants and the shapes of their planes.

products   2 M N K FLOPs for [M, K] times [K, N]. backward has one for each result that is wanted; tangent and
           back_tangent add two for a result (the product rule) where both pairs of operands are there. A product that
           all tasks share counts once. Taps of a convolution that fall outside the image are counted, as an implicit
           matrix product computes them.
others     OPERATIONS of the kernel for each element of the part's largest plane (of each tensor's, where it is of
           several), and one for each element of a bias that is added or of a cotangent that is summed for one.
views      (kind "free" in `kernels.KERNELS`) cost nothing: their result is the memory of their operands.
bytes      of a call: every plane once that it reads and did not write itself, and every plane that it writes and
           somebody else reads, be it a later call, the way back or the caller. What only parts of the same call read
           stays on chip. A plane counts whole, also a table of which an embedding looks up a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane, Schedule
from mtml_kernels.schedule.kernels import KERNELS, Convolution, Linear

__all__ = ["OPERATIONS", "Cost", "Product", "costs", "part_flops", "products_of"]

# By count of the formulas in kernels.py: a sum, a product, a comparison is one; a division, a root, an exponential or
# a sine are eight. Of these kernels bytes decide, so that nothing hangs on a factor of two.
OPERATIONS: dict[str, int] = {
    "norm.stats": 4,
    "norm.sums": 5,
    "norm.stats_tangent": 3,
    "norm.sums_tangent": 12,
    "norm.apply": 4,
    "norm.back": 5,
    "norm.tangent": 8,
    "norm.back_tangent": 16,
    "act.forward": 8,
    "act.backward": 9,
    "act.tangent": 9,
    "act.back_tangent": 19,
    "add.forward": 1,
    "mul.forward": 1,
    "mul.tangent": 3,
    "mul.backward": 4,
    "affine.forward": 2,
    "cat.forward": 0,
    "slice.forward": 0,
    "slice.backward": 0,
    "pool.forward": 1,
    "pool.backward": 1,
    "pool.tangent": 1,
    "scale": 1,
    "accumulate": 1,
    "reduce": 1,
    "update.step": 2,
    "update.direction": 1,
    "update.rule": 32,
    "update.adjoint": 96,
    "update.clip": 3,
    "update.unclip": 6,
    "update.rate": 2,
    "softmax.forward": 12,
    "softmax.backward": 4,
    "softmax.tangent": 4,
    "softmax.back_tangent": 10,
    "weights.forward": 9,
    "weights.backward": 12,
    "loss.forward": 16,
    "loss.tangent": 16,
    "loss.data": 24,
    "loss.sum": 2,
    "embedding.forward": 0,
    "embedding.tangent": 0,
    "embedding.backward": 1,
    "tasks.sum": 1,
}


class Product(NamedTuple):
    """`batch` results [rows, cols], and the multiply-adds of all of them, both terms of a product rule among them."""

    batch: int
    rows: int
    cols: int
    multiply_adds: int

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def depth(self) -> int:
        """Multiply-adds for one element of the result."""
        return -(-self.multiply_adds // max(self.batch * self.rows * self.cols, 1))


class Cost(NamedTuple):
    """What one call does: its products, its other operations, and the bytes that it reads and writes."""

    products: tuple[Product, ...]
    others: int
    read: int
    written: int

    @property
    def flops(self) -> int:
        """Of its products and everything else."""
        return sum(product.flops for product in self.products) + self.others

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


# --- FLOPs of a part --------------------------------------------------------------------------------------------------

# The result's role: the pairs of operands whose products add up to it.
_TERMS: dict[str, tuple[tuple[str, str], ...]] = {
    "y": (("x", "w"),),
    "yt": (("xt", "w"), ("x", "wt")),
    "dx": (("d", "w"),),
    "dxt": (("dt", "w"), ("d", "wt")),
    "dw": (("d", "x"),),
    "dwt": (("dt", "x"), ("d", "xt")),
}


def _by_role(part: Part, planes: Sequence[Plane]) -> dict[str, Plane]:
    """Operands and results that are there."""
    kernel = KERNELS[part.kernel]
    pairs = zip((*kernel.reads, *kernel.writes), (*part.reads, *part.writes), strict=True)
    return {role: planes[i] for role, i in pairs if i != ABSENT}


def products_of(part: Part, planes: Sequence[Plane]) -> tuple[Product, ...]:
    """The products of a linear layer's or a convolution's part; none of any other."""
    if not isinstance(part.constants, Linear | Convolution):
        return ()
    found = _by_role(part, planes)
    groups = int(part.constants.window[-1]) if isinstance(part.constants, Convolution) else 1
    there = {role: [pair for pair in terms if found.keys() >= {*pair}] for role, terms in _TERMS.items()}
    return tuple(_product(role, terms, found, groups) for role, terms in there.items() if role in found and terms)


def _product(role: str, terms: Sequence[tuple[str, str]], found: dict[str, Plane], groups: int) -> Product:
    """One result, of terms that are there. Weights that all tasks share make one matrix of all tasks' rows."""
    seen = next(found[name] for name in ("y", "yt", "d", "dt") if name in found)  # [T, N, rows, O]
    _, samples, rows, outputs = seen.shape
    weight = next(found[name] for name in ("w", "wt", "dw", "dwt") if name in found)
    depth = weight.elements // weight.shape[0] // outputs  # inputs of one output: I, or C / groups * kh * kw
    tasks = sum(max(found[a].shape[0], found[b].shape[0]) for a, b in terms)
    result, shape = found[role], found[role].shape
    if role in ("dw", "dwt"):
        batch, height, width = shape[0] * groups, shape[1] // groups, shape[2]
    else:
        own = max(found[name].shape[0] for pair in terms for name in pair if name in ("w", "wt") and name in found)
        batch, width = own * groups, shape[-1] // groups
        height = result.elements // (batch * width)
    return Product(batch, height, width, tasks * samples * rows * outputs * depth)


def _others(part: Part, planes: Sequence[Plane]) -> int:
    """Operations outside of products."""
    if KERNELS[part.kernel].kind == "free":
        return 0
    found = _by_role(part, planes) if KERNELS[part.kernel].kind == "product" else {}
    if found:
        summed = [found[d] for db, d in (("db", "d"), ("dbt", "dt")) if db in found]
        added = [found[y] for b, y in (("b", "y"), ("bt", "yt")) if b in found and y in found]
        return sum(plane.elements for plane in (*summed, *added))
    return OPERATIONS[part.kernel] * _elements(part, planes)


def _elements(part: Part, planes: Sequence[Plane]) -> int:
    """Of its largest plane, or of the largest operand of each of its tensors."""
    kernel = KERNELS[part.kernel]
    count = kernel.tensors(len(part.reads))
    if not count:
        return max((planes[i].elements for i in (*part.reads, *part.writes) if i != ABSENT), default=0)
    lead = next(at for at, role in enumerate(kernel.reads) if role.endswith("*"))
    last = len(part.reads) - sum(not role.endswith("*") for role in kernel.reads[lead:])
    own = [part.reads[at:last:count] for at in range(lead, lead + count)]
    return sum(max((planes[i].elements for i in tensor if i != ABSENT), default=0) for tensor in own)


def part_flops(part: Part, planes: Sequence[Plane]) -> int:
    """All FLOPs of a part."""
    return sum(product.flops for product in products_of(part, planes)) + _others(part, planes)


# --- bytes of a call --------------------------------------------------------------------------------------------------


def _memory(schedule: Schedule) -> dict[int, tuple[int, ...]]:
    """Of every result of a view the planes in whose memory it lies."""
    lies: dict[int, tuple[int, ...]] = {}
    for call in schedule.calls:
        for part in call.parts:
            if KERNELS[part.kernel].kind == "free":
                read = () if part.kernel == "zeros" else part.reads  # which are nobody's
                below = tuple(j for i in read for j in lies.get(i, (i,)))
                lies.update((plane, below) for plane in part.writes)
    return lies


def _working(call: Call) -> Iterator[Part]:
    return (part for part in call.parts if KERNELS[part.kernel].kind != "free")


def costs(schedule: Schedule) -> list[Cost]:
    """Of every call in its place."""
    lies = _memory(schedule)

    def memory(planes: Sequence[int]) -> set[int]:
        return {j for i in planes if i != ABSENT for j in lies.get(i, (i,))}

    reads = [memory([i for part in _working(call) for i in part.reads]) for call in schedule.calls]
    writes = [memory([i for part in _working(call) for i in part.writes]) for call in schedule.calls]
    later = memory([*schedule.results, *schedule.kept])
    found: list[Cost] = []
    for call, read, written in reversed(list(zip(schedule.calls, reads, writes, strict=True))):
        found.append(_cost(call, schedule.planes, read - written, written & later))
        later |= read
    return found[::-1]


def _cost(call: Call, planes: Sequence[Plane], read: set[int], written: set[int]) -> Cost:
    return Cost(
        tuple(product for part in call.parts for product in products_of(part, planes)),
        sum(_others(part, planes) for part in call.parts),
        sum(planes[i].bytes for i in read),
        sum(planes[i].bytes for i in written),
    )
