"""The launches of functions that need not run: as their launcher specialises them, compiled for any GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from multihead_loss import usage
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

__all__ = ["Recorded", "needs", "recorded"]

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


class Recorded(NamedTuple):
    """One launch, as `triton.compile` takes it."""

    kernel: Any
    signature: dict[str, Any]  # of a tuple a tuple
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def key(self) -> str:
        """Equal for launches that share their code."""
        return str((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))


def _typed(value: Any, what: str) -> tuple[str, int]:
    """The type of an argument, and the number that 16 may divide."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr()
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value
    raise TypeError(f"{what} is {value!r}")


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for param in kernel.params:
        value, at = values[param.name], (param.num,)
        if param.is_constexpr or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[at] = "constexpr", value
            continue
        several = isinstance(value, tuple)
        found = [_typed(each, f"{kernel.__name__}: {param.name}") for each in (value if several else (value,))]
        signature[param.name] = tuple(kind for kind, _ in found) if several else found[0][0]
        for i, (_, number) in enumerate(found):
            if number % 16 == 0 and not param.do_not_specialize:
                attributes[(*at, i) if several else at] = DIVISIBLE
    return Recorded(kernel, signature, constants, attributes, options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """Launches within it are written down, and nothing runs."""
    found: list[Recorded] = []
    before = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: found.append(_launch(self, args, kwargs))
    try:
        yield found
    finally:
        JITFunction.run = before


def needs(launch: Recorded, capability: int) -> dict[str, Any]:
    """What a program of a launch takes on a GPU of this compute capability."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return {"name": launch.kernel.__name__, "shared": built.metadata.shared, "usage": usage(built.asm["cubin"])}
