"""What Triton's interpreter lets one see of a launch: which bytes each program touches, and whether order matters.

The interpreter runs a launch's programs one after another, so that a race between them never shows by itself. Here the
addresses of every load and store are logged, which finds a conflict whatever the timing, and programs run in another
order. A race inside one program stays unseen, but for memory that a program reads after it has written it: Triton
orders the threads of a program only where it knows of the dependence.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from mtml_kernels.triton import device

__all__ = ["Conflict", "Watch", "permuted", "poison", "products_in_order", "unwritten", "watched"]

Program = tuple[int, int, int]
_HERE: Program = (0, 0, 0)
_BUILDER: Any = interpreter.interpreter_builder


class Conflict(NamedTuple):
    """Of one launch: `kind` is one of

    write-write, write-read   two programs touch a byte, of whom one writes it
    reused                    a program reads what it has written
    atomic                    a program adds to memory in whatever order programs come
    outside                   a byte that belongs to none of the tensors that the launch was given
    unguarded                 the launch would go to whatever device is the current one, not to its tensors'
    """

    kind: str
    launch: int
    programs: tuple[Program, Program]
    byte: int


class Watch:
    """The launches seen so far. `outside` needs all memory of a launch to come by tensors, not by addresses in a table;
    `reused` is left out where barriers are written.
    """

    def __init__(self, outside: bool = True, reused: bool = True) -> None:
        self.launches = 0
        self.programs = 0
        self._outside, self._reused = outside, reused
        self._guards = 0  # of `device.on` around what runs
        self._found: list[Conflict] = []
        self._reads: dict[Program, list[Any]] = {}
        self._writes: dict[Program, list[Any]] = {}
        self._owned: list[tuple[int, int]] = []
        self._given: list[tuple[int, int]] = []

    @property
    def conflicts(self) -> list[Conflict]:
        """All that was found, one of each kind for each pair of programs."""
        self._close()
        return self._found

    def start(self, programs: int) -> None:
        """A launch begins, whose arguments have been seen."""
        self._close()
        self._owned, self._given = self._given, []
        self.launches += 1
        if not self._guards:
            self._note("unguarded", _HERE, _HERE, 0)
        self.programs += programs

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """In place of what `device.on` does on the CPU, which is nothing."""
        self._guards += 1
        try:
            yield
        finally:
            self._guards -= 1

    def own(self, given: Any) -> None:
        """What the launch may touch: the storages of the tensors among its arguments."""
        if isinstance(given, Tensor):
            storage = given.untyped_storage()
            self._given.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def load(self, pointers: Any, mask: Any) -> None:
        touched = _bytes(pointers, mask)
        self._reads.setdefault(_BUILDER.grid_idx, []).append(touched)
        for written in self._writes.get(_BUILDER.grid_idx, []) if self._reused else []:
            again = np.intersect1d(touched, written)
            if again.size:
                self._note("reused", _BUILDER.grid_idx, _BUILDER.grid_idx, int(again[0]))

    def store(self, pointers: Any, mask: Any) -> None:
        self._writes.setdefault(_BUILDER.grid_idx, []).append(_bytes(pointers, mask))

    def atomic(self, pointers: Any) -> None:
        self._note("atomic", _BUILDER.grid_idx, _BUILDER.grid_idx, int(np.ravel(pointers.data)[0]))

    def _note(self, kind: str, first: Program, second: Program, byte: int) -> None:
        found = Conflict(kind, self.launches, (first, second), byte)
        if all(found[:3] != other[:3] for other in self._found):
            self._found.append(found)

    def _close(self) -> None:
        """Compares what the programs of the last launch have touched."""
        writes, reads = ({p: np.unique(np.concatenate(a)) for p, a in t.items()} for t in (self._writes, self._reads))
        owner: dict[int, Program] = {}
        for program, touched in writes.items():
            for byte in touched.tolist():
                if owner.setdefault(byte, program) != program:
                    self._note("write-write", owner[byte], program, byte)
        written = np.sort(np.fromiter(owner, np.int64, len(owner)))
        for program, touched in reads.items():
            for byte in np.intersect1d(touched, written).tolist():
                if owner[byte] != program:
                    self._note("write-read", owner[byte], program, byte)
        if self._outside:
            for program, touched in (*writes.items(), *reads.items()):
                inside = np.zeros(touched.shape, bool)
                for first, end in self._owned:
                    inside |= (touched >= first) & (touched < end)
                if not inside.all():
                    self._note("outside", program, program, int(touched[~inside][0]))
        self._reads, self._writes, self._owned = {}, {}, []


def _bytes(pointers: Any, mask: Any) -> Any:
    """The addresses of all bytes behind the pointers whose mask is set, in order."""
    first = np.asarray(pointers.data, np.int64)
    first = np.unique(first[np.broadcast_to(np.asarray(mask.data, bool), first.shape)])
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return np.unique((first[:, None] + np.arange(size)).ravel())


@contextlib.contextmanager
def _replaced(owner: Any, **hooks: Callable[..., Any]) -> Iterator[None]:
    """Each hook is called with what it replaces, and then as it would be."""
    before = {name: getattr(owner, name) for name in hooks}
    for name, hook in hooks.items():
        setattr(owner, name, _bound(hook, before[name]))
    try:
        yield
    finally:
        for name, old in before.items():
            setattr(owner, name, old)


def _bound(hook: Callable[..., Any], old: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: hook(old, *args, **kwargs)


@contextlib.contextmanager
def watched(outside: bool = True, reused: bool = True) -> Iterator[Watch]:
    """Logs what the launches within it touch (`Watch.conflicts`)."""
    watch = Watch(outside, reused)

    def dims(old: Any, *size: int) -> None:
        watch.start(size[0] * size[1] * size[2])
        old(*size)

    def load(old: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        watch.load(pointers, mask)
        return old(pointers, mask, *rest, **kwargs)

    def store(old: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        watch.store(pointers, mask)
        return old(pointers, value, mask, *rest, **kwargs)

    def rmw(old: Any, operation: Any, pointers: Any, *rest: Any, **kwargs: Any) -> Any:
        watch.atomic(pointers)
        return old(operation, pointers, *rest, **kwargs)

    def cas(old: Any, pointers: Any, *rest: Any, **kwargs: Any) -> Any:
        watch.atomic(pointers)
        return old(pointers, *rest, **kwargs)

    def convert(old: Any, argument: Any) -> Any:
        watch.own(argument)
        return old(argument)

    hooks: dict[str, Callable[..., Any]] = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": rmw,
    }
    with (
        _replaced(_BUILDER, set_grid_dim=dims, create_atomic_cas=cas, **hooks),
        _replaced(interpreter, _implicit_cvt=convert),
        _replaced(device, nullcontext=lambda _: watch.guard()),
    ):
        yield watch


@contextlib.contextmanager
def permuted(seed: int) -> Iterator[None]:
    """Every launch within it runs its programs in an order drawn by the seed."""
    order: list[Program] = []

    def dims(old: Any, *size: int) -> None:
        order[:] = [(x, y, z) for x in range(size[0]) for y in range(size[1]) for z in range(size[2])]
        random.Random(seed).shuffle(order)
        old(*size)

    with _replaced(_BUILDER, set_grid_dim=dims, set_grid_idx=lambda old, *_: old(*order.pop())):
        yield


@contextlib.contextmanager
def products_in_order() -> Iterator[None]:
    """Products of matrices inside are added up along their depth, one after the other, as a GPU does it for every row.

    NumPy's may depend on how many rows there are: its library has other code for what is left of a block, which on some
    CPUs adds up in another order.
    """

    def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        found = total.data.copy()
        for k in range(a.data.shape[-1]):
            found += a.data[..., :, k : k + 1] * b.data[..., k : k + 1, :]
        return interpreter.TensorHandle(found, total.dtype.scalar)

    with _replaced(_BUILDER, create_dot=dot):
        yield


def poison(tensor: Tensor) -> Tensor:
    """NaN everywhere, or the largest integer: what a kernel forgets to write, or reads before it does, shows."""
    number = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return tensor.fill_(number)


def unwritten(tensor: Tensor) -> int:
    """How many elements are still as `poison` left them."""
    if tensor.is_floating_point():
        return int(tensor.isnan().sum())
    return int((tensor == torch.iinfo(tensor.dtype).max).sum())
