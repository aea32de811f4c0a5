"""A schedule under construction: planes are added and parts written down, in the order in which they will run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mtml_kernels.schedule.call import ABSENT, Part, Plane, Source
from mtml_kernels.schedule.kernels import Blank

__all__ = ["Draft", "joint", "wider"]

Dims = tuple[int, ...]


def joint(*shapes: Sequence[int]) -> Dims:
    """The shape to which these broadcast."""
    return tuple(torch.broadcast_shapes(*(tuple(s) for s in shapes)))


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of such numbers: float32 of half precision."""
    return torch.float32 if dtype.itemsize < 4 else dtype


class Draft:
    """Planes and parts; `where` names what the parts that follow do, for people.

    dtype: of the values; sums of them, parameters and their gradients are of `wide`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.wide = dtype, wider(dtype)
        self.planes: list[Plane] = []
        self.parts: list[tuple[str, Part]] = []
        self.where = ""
        self._sources: dict[tuple[Source, Dims], int] = {}
        self._owned: set[int] = set()  # planes whose memory is theirs alone

    def argument(self, field: str, index: int, shape: Sequence[int], name: str, **at: Any) -> int:
        """A plane of the caller's; `at`: its step, its dtype where that is not the values'."""
        source = Source(field, index, at.get("step"))
        key = source, tuple(shape)
        if key not in self._sources:
            self.planes.append(Plane(tuple(shape), at.get("dtype", self.dtype), name, source))
            self._sources[key] = len(self.planes) - 1
        return self._sources[key]

    def emit(
        self,
        kernel: str,
        reads: Sequence[int],
        shapes: Sequence[Sequence[int] | None],
        name: str,
        constants: Any = None,
        dtypes: Sequence[torch.dtype] = (),
    ) -> tuple[int, ...]:
        """A part; `shapes` of its results, None for one that is not wanted. Returns their planes.

        dtypes: of the results, by default that of the values.
        """
        writes = []
        for shape, dtype in zip(shapes, dtypes or [self.dtype] * len(shapes), strict=True):
            if shape is None:
                writes.append(ABSENT)
            else:
                self.planes.append(Plane(tuple(shape), dtype, name))
                writes.append(len(self.planes) - 1)
        self.parts.append((self.where, Part(kernel, tuple(reads), tuple(writes), constants)))
        return tuple(writes)

    def one(self, kernel: str, reads: Sequence[int], shape: Sequence[int], name: str, constants: Any = None) -> int:
        """A part with one result, of the values' dtype."""
        return self.emit(kernel, reads, [shape], name, constants)[0]

    def sum_of(self, a: int, b: int, name: str) -> int:
        """a + b, where either may be absent; in place of a where that is a sum or a product's gradient itself."""
        if a == ABSENT or b == ABSENT:
            return b if a == ABSENT else a
        shape = joint(self.shape(a), self.shape(b))
        in_place = a in self._owned and shape == self.shape(a)
        kernel = "accumulate" if in_place else "add.forward"
        dtype = torch.promote_types(self.planes[a].dtype, self.planes[b].dtype)
        (plane,) = self.emit(kernel, (a, b), [shape], name, None, [dtype])
        self._owned.discard(a)
        self._owned.add(plane)
        return plane

    def zeros(self, shape: Dims, like: int, dtype: torch.dtype, name: str) -> int:
        """Zeros on the device of another plane."""
        return self.emit("zeros", (like,), [shape], name, Blank(shape, dtype), [dtype])[0]

    def own(self, plane: int) -> int:
        """Say that a plane's memory is its alone, so that a sum may be taken in it."""
        if plane != ABSENT:
            self._owned.add(plane)
        return plane

    def share(self, plane: int) -> int:
        """Say that a plane is complete: others may hand on the same memory, so that nothing is added in it."""
        self._owned.discard(plane)
        return plane

    def shape(self, plane: int) -> Dims:
        """Its shape."""
        return self.planes[plane].shape
