"""What a call starts on its device, written down instead of run: Triton's launches and PyTorch's own kernels.

Tensors lie on "meta". A launch is specialised as Triton's launcher would do it: pointers and sizes that are divisible
by 16 are known to be, sizes of 1 are constants.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from mtml_kernels.schedule.cost import Product

__all__ = ["Move", "Moves", "Recorded", "launches_into", "moved", "recorded", "started"]

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
}
DIVISIBLE = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
NO_KERNELS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
)


class Recorded(NamedTuple):
    """One launch, as `triton.compile` takes it, and its programs, tensors by parameter of the code, numbers by name."""

    kernel: Any
    signature: dict[str, Any]  # of a tuple a tuple
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    programs: int
    tensors: dict[int, Tensor]
    numbers: dict[str, Any]
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)

    def key(self) -> str:
        """Equal for launches that share their code."""
        return str((self.kernel.cache_key, self.signature, self.constants, self.attributes, self.options))

    def bytes(self, used: frozenset[int]) -> int:
        """Of the tensors whose parameters the code uses: others stand for none. Sums in place count twice."""
        return sum(moved(tensor) for at, tensor in self.tensors.items() if at in used)


class Move(NamedTuple):
    """One kernel of PyTorch: its operation, the bytes of its operands and results, and the product that it is."""

    name: str
    bytes: int
    product: Product | None = None


def moved(tensor: Tensor) -> int:
    """Bytes of the elements that lie at places of their own: a dimension of stride 0 is one."""
    places = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n)
    return places * tensor.element_size()


def _programs(grid: Any, values: Mapping[str, Any]) -> int:
    return math.prod(grid(values) if callable(grid) else grid)


def _typed(value: Any, what: str) -> tuple[str, int]:
    """The type of an argument, and the number that 16 may divide."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr()
    if isinstance(value, float):
        return "fp32", 1
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value
    raise TypeError(f"{what} is {value!r}")


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Recorded:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    passed: list[Any] = []  # one after the other, as the code has its parameters
    for param in kernel.params:
        value, at = values[param.name], (param.num,)
        if param.is_constexpr or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[at] = "constexpr", value
            continue
        several = isinstance(value, tuple)
        each = value if several else (value,)
        found = [_typed(one, f"{kernel.__name__}: {param.name}") for one in each]
        signature[param.name] = tuple(kind for kind, _ in found) if several else found[0][0]
        passed += each
        for i, (_, number) in enumerate(found):
            if number % 16 == 0 and not param.do_not_specialize:
                attributes[(*at, i) if several else at] = DIVISIBLE
    tensors = {i: value for i, value in enumerate(passed) if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float | str | bool)}
    programs = _programs(grid, values)
    return Recorded(kernel, signature, constants, attributes, options, programs, tensors, numbers, values)


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}
"""PyTorch's products, and which of their operands is the left factor."""


def _product(name: str, args: Sequence[Any], result: Tensor) -> Product | None:
    """What a kernel of PyTorch multiplies."""
    if name not in _PRODUCTS:
        return None
    rows, cols = result.shape[-2:]
    batch = result.numel() // max(rows * cols, 1)
    return Product(batch, rows, cols, result.numel() * args[_PRODUCTS[name]].shape[-1])


class Moves(TorchDispatchMode):
    """Writes down PyTorch's operations, views and allocations left out. `tensors`: that are there before."""

    def __init__(self, found: list[Any], tensors: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.found = found
        self._made = list(tensors)

    def every(self) -> list[Tensor]:
        """All tensors that are there, or were."""
        return self._made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, Tensor):
            self._made.append(result)
        if isinstance(result, Tensor) and not (func.is_view or name in NO_KERNELS):
            operands = torch.utils._pytree.tree_leaves((args, kwargs, result))
            tensors = {id(t): t for t in operands if isinstance(t, Tensor)}
            self.found.append(Move(name, sum(map(moved, tensors.values())), _product(name, args, result)))
        return result


@contextlib.contextmanager
def launches_into(take: Callable[[Recorded], None]) -> Iterator[None]:
    """Triton's launches within it go there instead of to a GPU."""
    before = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: take(_launch(self, args, kwargs, grid))
    try:
        yield
    finally:
        JITFunction.run = before


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Launches within it are written down, and nothing runs."""
    found: list[Recorded] = []
    with launches_into(found.append):
        yield found


@contextlib.contextmanager
def started() -> Iterator[list[Recorded | Move]]:
    """The same, and PyTorch's own kernels among them, in their order."""
    found: list[Recorded | Move] = []
    with launches_into(found.append), Moves(found):
        yield found
