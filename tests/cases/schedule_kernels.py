"""Kernels of the schedule one by one: how to call one, and derivatives of any function to hold it against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.schedule.call import ABSENT, Part
from mtml_kernels.schedule.kernels import KERNELS
from mtml_kernels.schedule.torch_kernels import TORCH

Operands = Sequence[Tensor | None]


def part_of(name: str, constants: Any, operands: Operands, wants: Sequence[bool] | None = None) -> Part:
    """A part that reads these operands; by default all results are wanted."""
    roles = KERNELS[name].writes
    count = len(roles) if wants is None else len(wants)
    writes = tuple(100 + i if wants is None or wants[i] else ABSENT for i in range(count))
    return Part(name, tuple(ABSENT if t is None else i for i, t in enumerate(operands)), writes, constants)


def run(name: str, constants: Any, *operands: Tensor | None, wants: Sequence[bool] | None = None) -> list[Any]:
    """The results of one kernel, which must not change its operands; `accumulate`, which does, gets a copy."""
    if name == "accumulate":
        operands = tuple(None if t is None else t.clone() for t in operands)
        return list(TORCH[name](part_of(name, constants, operands, wants), *operands))
    before = [None if t is None else t.clone() for t in operands]
    results = TORCH[name](part_of(name, constants, operands, wants), *operands)
    for t, old in zip(operands, before, strict=True):
        assert t is None or old is None or torch.equal(t.nan_to_num(), old.nan_to_num()), f"{name} changed an operand"
    return list(results)


def scattered(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers whose dimensions lie in another order in memory."""
    return torch.randn(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))


def close(got: Tensor | None, expected: Tensor, what: str = "", tolerance: float = 1e-10) -> None:
    """Equal to rounding, where None stands for zero."""
    got = torch.zeros_like(expected) if got is None else got
    assert got.shape == expected.shape, f"{what}: {list(got.shape)} in place of {list(expected.shape)}"
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def derivatives(
    f: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], d: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """(y, yt, cotangents of the primals, tangents of these) of y = f(*primals), by torch.func."""

    def back(*given: Tensor) -> tuple[Tensor, ...]:
        *at, cotangent = given
        return torch.func.vjp(f, *at)[1](cotangent)

    y, yt = torch.func.jvp(f, tuple(primals), tuple(tangents))
    first, second = torch.func.jvp(back, (*primals, d), (*tangents, dt))
    return y, yt, first, second


def presence(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The tensors with every subset of them absent, but for all at once; what is None is so always."""
    options = [(None,) if t is None else (t, None) for t in tensors]
    return (list(chosen) for chosen in itertools.product(*options) if any(t is not None for t in chosen))


def filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in place of what is absent."""
    return [torch.zeros_like(full) if t is None else t for t, full in zip(tensors, like, strict=True)]
