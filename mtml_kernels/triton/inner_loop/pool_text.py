"""The lines of a job that pools: at its beginning, gathered from memory, or at its end, of what it has just made."""

from __future__ import annotations

from collections.abc import Sequence

from mtml_kernels.program.layers.pool import Pool
from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import Pooling
from mtml_kernels.triton.inner_loop.jobs import Operand
from mtml_kernels.triton.inner_loop.pool import Panes, Reach

__all__ = ["after_panes", "before_panes", "gathered", "in_pane", "pane_lines"]

Names = list[str | None]


def _arguments(given: Pooling) -> str:
    return ", ".join(map(str, (int(given.kind), *Reach.of(given).constants())))


def _base(operand: Operand) -> str:
    """The address of an image's channel: all but its points."""
    terms = [
        f"{index} * {stride}"
        for index, size, stride in zip("tnrc", operand.shape, operand.strides, strict=True)
        if size > 1 and index != "r"
    ]
    return " + ".join([operand.name, *terms, "m * 0", "c * 0"])


def _row_stride(operand: Operand) -> int:
    return operand.strides[2] if operand.shape[2] > 1 else 0


# --- a pooling that begins a job --------------------------------------------------------------------------------------


def gathered(part: Part, operands: Sequence[Operand | None], type_: str) -> tuple[list[str], Names]:
    """Lines, and the names of its results."""
    given, x = part.constants, operands[0]
    assert x is not None
    index = operands[1] if part.kernel != "pool.forward" else None
    if part.kernel == "pool.backward":
        return _backward(given, x, index, type_), ["pooled_d"]
    if part.kernel == "pool.tangent" and index is not None:
        at = f"tl.load({_base(index)} + r * {_row_stride(index)}, mask=live, other=0).to(tl.int32)"
        load = f"tl.load({_base(x)} + place * {_row_stride(x)}, mask=live, other=0.0).to({type_})"
        return [f"place = {at}", f"best = {load}"], ["best"]
    call = f"pooled({_base(x)}, r + m * 0, {_row_stride(x)}, live, {_arguments(given)}, {type_})"
    return [f"best, place = {call}"], ["best", "place"]


def _backward(given: Pooling, d: Operand, index: Operand | None, type_: str) -> list[str]:
    own = d if index is None else index
    call = f"{_base(d)}, {_base(own)}, r + m * 0, {_row_stride(d)}, {_row_stride(own)}"
    return [f"pooled_d = pooled_back({call}, live, {_arguments(given)}, {type_})"]


# --- a pooling that ends one ------------------------------------------------------------------------------------------


def before_panes(part: Part, panes: Panes, index: Operand | None, shape: Sequence[int], type_: str) -> list[str]:
    """Before the loop over a window's points: rows m are windows; those that are not whole are not pooled."""
    (height, width), wide = panes.grid, panes.out[1]
    lines = [
        f"n = m // {height * width}",
        f"pane_y = m % {height * width} // {width}",
        f"pane_x = m % {width}",
        f"pane = pane_y * {wide} + pane_x",
        f"whole = live & (pane_y < {panes.out[0]}) & (pane_x < {wide})",
        f"best = tl.zeros({list(shape)}, {type_})",
        f"place = tl.full({list(shape)}, -1, tl.int32)",
    ]
    if index is not None:
        address = f"{_base(index)} + pane * {_row_stride(index)}"
        lines += [f"taken = tl.load({address}, mask=whole, other=-1)"]
    return lines


def pane_lines(panes: Panes) -> list[str]:
    """At the head of the loop over `tap`: the point r, and whether it is of the image."""
    (high, wide), (height, width) = panes.kernel, panes.size
    return [
        f"y = pane_y * {high} + tap // {wide}",
        f"x = pane_x * {wide} + tap % {wide}",
        f"r = y * {width} + x",
        f"live = live_m & live_c & (y < {height}) & (x < {width})",
    ]


def in_pane(part: Part, value: str) -> list[str]:
    """At its end."""
    if part.kernel == "pool.tangent" and part.constants.kind == Pool.MAX:
        return [f"best = tl.where(taken == r, {value}, best)"]
    return [f"best, place = larger(best, place, {value}, r, live & whole, {int(part.constants.kind)})"]


def after_panes(part: Part) -> tuple[list[str], list[str]]:
    """After the loop: windows are the rows of what is stored. The names of the results."""
    lines = ["r = pane", "live = whole"]
    if part.constants.kind != Pool.MAX:
        lines = [f"best = divided(best, pane, {_arguments(part.constants)})", *lines]
    return lines, ["best", "place"][: len(part.writes)]
