"""What every op asks at its door: exported and hand-made graphs call `torch.ops.mtml.*` without any other check."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from mtml_kernels.checks import shown
from mtml_kernels.memory import in_memory

__all__ = ["Door"]

_looks = operator.attrgetter("shape", "dtype", "device", "layout")  # all that the checks of a tensor look at
_MOST = 512


class Door:
    """The checks of one op, whose messages begin with its name and end with the way out."""

    def __init__(self, op: str, way_out: str) -> None:
        self.op, self.way_out = op, way_out
        self._passed: set[Hashable] = set()

    def passed(self, tensors: Iterable[Tensor | None], *others: Hashable) -> Hashable:
        """True where arguments that look like these have passed, else the key to `remember` them by once they have."""
        try:
            key = (*[t if t is None else _looks(t) for t in tensors], *others)
        except AttributeError:  # something is no tensor: the checks say so
            return None
        return True if key in self._passed else key

    def remember(self, key: Hashable) -> None:
        """To be called when all checks have passed."""
        if len(self._passed) >= _MOST:
            self._passed.clear()
        self._passed.add(key)

    def given(self, name: str, *tensors: Tensor | None) -> None:
        """TypeError where one is None: the dispatcher takes it for a tensor without memory."""
        for t in tensors:
            if not isinstance(t, Tensor):
                raise TypeError(f"{self.op}: {name}: expected a tensor, got {t!r}. {self.way_out}")

    def expect(self, right: bool, name: str, expected: str, got: object) -> None:
        """ValueError unless `right`."""
        if not right:
            shape = shown(got) if isinstance(got, Tensor) else got
            raise ValueError(f"{self.op}: {name}: expected {expected}, got {shape}. {self.way_out}")

    def shape(self, name: str, t: Tensor | None, *allowed: Sequence[int]) -> None:
        """ValueError where a tensor that is given has none of these shapes."""
        if t is not None and not any(tuple(t.shape) == tuple(shape) for shape in allowed):
            self.expect(False, name, " or ".join(str(list(shape)) for shape in allowed), t)

    def length(self, name: str, values: Sequence[object], *allowed: int) -> None:
        """ValueError where a list has another length."""
        if len(values) not in allowed:
            self.expect(False, name, f"{' or '.join(map(str, allowed))} entries", f"{len(values)}")

    def floats(self, like: Tensor, name: str) -> None:
        """TypeError unless the tensor that gives the others their dtype is of floating-point numbers."""
        if not like.is_floating_point():
            raise TypeError(f"{self.op}: {name}: expected floating-point numbers, got {shown(like)}. {self.way_out}")

    def kinds(self, tensors: Iterable[tuple[str, Tensor | None, torch.dtype]], device: torch.device) -> None:
        """TypeError or ValueError where a tensor has another dtype or device than it must, or is not dense."""
        for name, t, dtype in tensors:
            if t is None:
                continue
            if t.dtype != dtype:
                raise TypeError(f"{self.op}: {name}: expected {dtype}, got {shown(t)}. {self.way_out}")
            if t.device != device or t.layout != torch.strided:
                self.expect(False, name, f"a dense tensor on {device}", f"{shown(t)} ({t.layout})")

    def memory(self, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        """TypeError where a tensor on the CPU has no memory, or not enough: what no backend looks at by itself."""
        for name, t in tensors:
            if t is not None and t.device.type == "cpu":
                in_memory(f"{self.op}: {name}", t)
