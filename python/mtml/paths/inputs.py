"""A model's input, a tensor or a tuple or dict of such, as a program sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mtml_kernels.program import InputInfo, Program

__all__ = ["input_names", "named_inputs", "sample_shapes"]


def sample_shapes(x: Any) -> Any:
    """Per-sample shapes as `trace` takes them; None for an input that is nested deeper than it can take."""
    if isinstance(x, Tensor):
        return [tuple(x.shape[2:])]
    values = list(x.values()) if isinstance(x, Mapping) else list(x)
    if not all(isinstance(value, Tensor) for value in values):
        return None
    shapes = [tuple(value.shape[2:]) for value in values]
    return dict(zip(x, shapes, strict=True)) if isinstance(x, Mapping) else shapes


def named_inputs(program: Program, name: str, x: Any) -> Iterator[tuple[InputInfo, str, Tensor]]:
    """The program's inputs, what to call each, and its tensor in x."""
    picks = input_names(program, x)
    for i, info in enumerate(program.inputs):
        yield (info, name, x) if picks is None else (info, f"{name}[{picks[i]!r}]", x[picks[i]])


def input_names(program: Program, x: Any) -> list[Any] | None:
    """How to pick the program's inputs out of x, in their order; None for a single tensor."""
    if isinstance(x, Tensor):
        return None
    return [p.name for p in program.inputs] if isinstance(x, Mapping) else list(range(len(program.inputs)))
