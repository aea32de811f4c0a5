"""Launches on tensors: results allocated, the kernel's text made for their strides, compiled once, and started."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, empty

from mtml_kernels.schedule.call import Part, Plane
from mtml_kernels.triton.backends import interpreted
from mtml_kernels.triton.device import on
from mtml_kernels.triton.inner_loop import activations, loss_kernels, pool_kernels, share_kernels
from mtml_kernels.triton.inner_loop.jobs import Launch, Operand
from mtml_kernels.triton.inner_loop.policy import WARPS
from mtml_kernels.triton.inner_loop.source import kernel_text

__all__ = ["LaunchKernel", "compiled", "options_of", "precision"]

_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
_MODULES = activations, loss_kernels, pool_kernels, share_kernels
_NAMES = {name: getattr(module, name) for module in _MODULES for name in module.__all__}


def precision() -> str:
    """Of products of float32, as torch.get_float32_matmul_precision says."""
    return _PRECISIONS[torch.get_float32_matmul_precision()]


@functools.lru_cache(maxsize=4096)
def compiled(text: str) -> Any:
    """The kernel `launched` of a text. Triton reads sources back, here from Python's cache of lines."""
    name = f"<mtml {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    found: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": "mtml_kernels.triton.inner_loop.made", **_NAMES}
    exec(compile(text, name, "exec"), found)  # made here, of numbers and of names of this project
    return found["launched"]


def options_of(launch: Launch) -> dict[str, Any]:
    """What the launcher tells the compiler; AOT tests use the same."""
    stages = 3 if any(job.product is not None for job in launch.jobs) else 1
    return {"num_warps": WARPS, "num_stages": stages, "enable_fp_fusion": False}


class LaunchKernel:
    """One launch of a schedule: called as its kernels are, (part, *operands) -> results."""

    def __init__(self, launch: Launch, planes: Sequence[Plane], stored: Sequence[int]) -> None:
        self.launch, self.planes = launch, planes
        self.reads = tuple(sorted(launch.needs))
        self.writes = tuple(stored)
        adding = [part for job in launch.jobs for part in job.parts if part.kernel == "accumulate"]
        places = {plane: i for i, plane in enumerate(self.reads)}
        # Sums in place: the result is the operand's tensor.
        self.in_place = {part.writes[0]: places[part.reads[0]] for part in adding if part.reads[0] in places}
        self._made: dict[Any, tuple[Any, int]] = {}

    @property
    def part(self) -> Part:
        """As a step of a schedule."""
        return Part("launch", self.reads, self.writes)

    def __call__(self, part: Part, *operands: Tensor) -> tuple[Tensor | None, ...]:
        device = operands[0].device
        results = [self._result(plane, operands, device) for plane in self.writes]
        tensors = (*operands, *results)
        key = (precision(), *((t.stride(), t.dtype) for t in tensors))
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self.kernel(tensors)
        kernel, count = made
        if count:
            with on(device):
                kernel[(count,)](*tensors, **options_of(self.launch))
        return tuple(results)

    def _result(self, plane: int, operands: Sequence[Tensor], device: torch.device) -> Tensor:
        if plane in self.in_place:
            return operands[self.in_place[plane]]
        form = self.planes[plane]
        return empty(form.shape, dtype=form.dtype, device=device)

    def text(self, tensors: Sequence[Tensor]) -> tuple[str, int]:
        """The source for operands and results of these strides and dtypes, and its number of programs."""
        made = [
            Operand(f"p{i}", tuple(t.shape), tuple(t.stride()), str(t.dtype).removeprefix("torch."))
            for i, t in enumerate(tensors)
        ]
        operands = dict(zip(self.reads, made[: len(self.reads)], strict=True))
        stored = dict(zip(self.writes, made[len(self.reads) :], strict=True))
        return kernel_text(self.launch, operands, stored, precision(), interpreted())

    def kernel(self, tensors: Sequence[Tensor]) -> tuple[Any, int]:
        """The compiled kernel and its number of programs."""
        text, count = self.text(tensors)
        return compiled(text), count
