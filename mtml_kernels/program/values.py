"""What tracing knows about each value: its shape, whether it is batched, and which memory it shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mtml_kernels.program.encoding import Shape
from mtml_kernels.program.obstacles import Cannot

__all__ = [
    "BatchSize",
    "Memory",
    "SameType",
    "Value",
    "as_int",
    "broadcast",
    "dimension",
    "fill",
    "listed",
    "optional",
    "pad",
    "resolve_view",
    "split_point",
    "tensor",
    "without_lead",
]


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """The batch size N, times `times`: what `x.shape[0]` gives."""

    times: int = 1


@dataclasses.dataclass(frozen=True)
class SameType:
    """`x.dtype` or `x.device`: all tensors of a fused call agree in both, so a conversion to it changes nothing."""


class Memory:
    """A piece of memory that views share; every in-place change raises its version."""

    def __init__(self, owner: str = "") -> None:
        self.owner = owner  # names an input or parameter that must not be changed in place
        self.version = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor seen while tracing.

    Batched: the tensor is [N * lead, *shape]; `lead` is above 1 where points were folded into the batch. Unbatched
    (`lead` = 0): the tensor is [*shape], a function of parameters alone. `node` holds its elements in row-major
    order, with whatever rows and features were convenient; -1 for a parameter that has not been read yet. In image form
    `shape` is (channels, *space), and `node` has exactly a row for every point and a column for every channel.
    """

    node: int
    shape: Shape
    lead: int
    memory: Memory
    version: int
    param: str = ""  # the name, where the value is exactly a parameter
    transposed: bool = False  # `param.T`: `shape` is that of the transpose
    image: bool = False  # in image form

    @property
    def batched(self) -> bool:
        """Whether there is one for each sample."""
        return self.lead > 0

    @property
    def ndim(self) -> int:
        """Dimensions of the tensor, the batch dimension included."""
        return len(self.shape) + self.batched

    @property
    def dims(self) -> Shape:
        """Dimensions of one sample with `lead` in front, at least one: the last are the features."""
        return (self.lead, *(self.shape or (1,))) if self.batched else (self.shape or (1,))

    @property
    def rows(self) -> int:
        """Rows of one sample as a matrix."""
        return math.prod(self.dims[:-1])

    @property
    def features(self) -> int:
        """Columns of one sample as a matrix."""
        return self.dims[-1]

    @property
    def elements(self) -> int:
        """Elements of one sample."""
        return math.prod(self.dims)

    @property
    def points(self) -> int:
        """Elements of a channel, where the first dimension of `shape` counts the channels."""
        return math.prod(self.shape[1:])

    def is_row(self, features: int) -> bool:
        """Whether it is a parameter [F] itself."""
        return bool(self.param) and not self.transposed and self.shape == (features,)

    def sizes(self) -> tuple[int | BatchSize, ...]:
        """What `tensor.shape` gives."""
        return (BatchSize(self.lead), *self.shape) if self.batched else self.shape

    def __str__(self) -> str:
        lead = "N" if self.lead == 1 else f"N*{self.lead}"
        return str([*([lead] if self.batched else []), *self.shape]).replace("'", "")


def dimension(value: Value, dim: object, extra: int = 0) -> int:
    """`dim` counted from the front; `extra` further positions are allowed (unsqueeze)."""
    count = value.ndim + extra
    if not isinstance(dim, int) or not -count <= dim < max(count, 1):
        raise Cannot(f"dimension {dim} of a tensor {value} is not one")
    return dim % count if count else 0


def tensor(x: object) -> Value:
    """An operand that must be a tensor. Raises Cannot where it is anything else."""
    if isinstance(x, Value):
        return x
    if isinstance(x, BatchSize):
        raise Cannot("the batch size enters the computation")
    raise Cannot(f"an operand is a {type(x).__name__}, not a tensor")


def optional(x: object) -> Value | None:
    """An operand that may be missing."""
    return None if x is None else tensor(x)


def listed(sizes: Sequence[Any]) -> list[Any]:
    """Sizes given one by one or as one sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        return list(sizes[0])
    return list(sizes)


def as_int(size: object) -> int:
    """A plain size."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise Cannot("a size is computed from data, or the batch size is used where a plain size belongs")
    return size


def fill(sizes: Sequence[object], total: int) -> Shape:
    """`sizes` with its -1 replaced so that the product is `total`."""
    known = [as_int(size) for size in sizes]
    rest = math.prod(size for size in known if size != -1)
    if known.count(-1) > 1 or rest <= 0 or total % rest or (-1 not in known and rest != total):
        raise Cannot(f"{total} elements do not fill {list(known)}")
    return tuple(total // rest if size == -1 else size for size in known)


def resolve_view(value: Value, sizes: Sequence[object]) -> tuple[int, Shape]:
    """(lead, shape) of `value.reshape(sizes)`."""
    if not value.batched:
        return 0, fill(sizes, math.prod(value.shape))
    if any(isinstance(size, BatchSize) for size in sizes[1:]):
        raise Cannot("the view moves the batch dimension away from the front")
    if not sizes:
        raise Cannot("the view removes the batch dimension")
    first, rest = sizes[0], sizes[1:]
    if isinstance(first, BatchSize):
        if value.elements % first.times:
            raise Cannot(f"{value} cannot be viewed with {first.times} * N rows")
        return first.times, fill(rest, value.elements // first.times)
    if first == -1:
        lead, *shape = fill(sizes, value.elements)
        return lead, tuple(shape)
    raise Cannot(f"the view fixes the first dimension to {first}, which is the batch's; use x.shape[0] or -1 there")


def broadcast(a: Value, b: Value) -> tuple[int, Shape]:
    """(lead, shape) of an elementwise operation, by PyTorch's rules, where no sample meets another."""
    if a.batched and b.batched:
        if a.lead != b.lead or a.ndim != b.ndim:
            raise Cannot(f"broadcasting {a} with {b} mixes samples")
        return a.lead, _broadcast_shapes(a, a.shape, b, b.shape)
    if not a.batched and not b.batched:
        return 0, _broadcast_shapes(a, a.shape, b, b.shape)
    batched, other = (a, b) if a.batched else (b, a)
    return batched.lead, _broadcast_shapes(batched, batched.shape, other, without_lead(other, batched.ndim))


def without_lead(value: Value, ndim: int) -> Shape:
    """The shape of an unbatched value beside one sample of a batched tensor with `ndim` dimensions."""
    if value.ndim < ndim:
        return value.shape
    if value.ndim == ndim and value.shape[0] == 1:
        return value.shape[1:]
    raise Cannot(f"a tensor {value} that does not depend on the sample meets the batch dimension")


def _broadcast_shapes(a: Value, shape_a: Shape, b: Value, shape_b: Shape) -> Shape:
    n = max(len(shape_a), len(shape_b))
    padded = zip(pad(shape_a, n), pad(shape_b, n), strict=True)
    if a.batched and len(shape_a) < n:
        raise Cannot(f"broadcasting {a} with {b} mixes samples")
    pairs = list(padded)
    if any(x != y and 1 not in (x, y) for x, y in pairs):
        raise Cannot(f"{a} and {b} cannot be broadcast together")
    return tuple(max(pair) for pair in pairs)


def pad(shape: Shape, n: int) -> Shape:
    """The shape with ones in front, n dimensions in all."""
    return (1,) * (n - len(shape)) + shape


def split_point(targets: Shape, operands: Sequence[tuple[Value, Shape]]) -> int:
    """Where to cut `targets` into rows and features so that every operand broadcasts in the program's terms.

    An operand's rows must be the target's, or 1 if it is unbatched; its features must be the target's or 1.
    The natural cut, before the last dimension, is preferred: it needs no view.
    """
    n = len(targets)
    for cut in (n - 1, *range(n - 1), n):
        if all(_fits(targets, dims, cut, value.batched) for value, dims in operands):
            return cut
    shapes = " and ".join(str(value) for value, _ in operands)
    raise Cannot(f"{shapes} broadcast over some of the rows only")


def _fits(targets: Shape, dims: Shape, cut: int, batched: bool) -> bool:
    rows, features = dims[:cut], dims[cut:]
    same_rows = rows == targets[:cut]
    same_features = features == targets[cut:]
    one_row = math.prod(rows) == 1 and not batched
    return (same_rows or one_row) and (same_features or math.prod(features) == 1)
