"""The lines by which a job goes on with the loss of its logits: a sample's are whole in a tile."""

from __future__ import annotations

from collections.abc import Mapping

from mtml_kernels.schedule.call import Part
from mtml_kernels.schedule.kernels import KERNELS
from mtml_kernels.schema.losses import KINDS, SOFT
from mtml_kernels.triton.inner_loop.jobs import Operand
from mtml_kernels.triton.inner_loop.policy import Tile

__all__ = ["judged"]

_IDS = KINDS.index("cross_entropy")


def judged(
    part: Part, z: str, zt: str | None, operands: Mapping[int, Operand], shape: tuple[int, ...], tile: Tile, type_: str
) -> tuple[list[str], list[str]]:
    """Lines, and the names of its results.

    Args:
        part: loss.forward or loss.tangent.
        z, zt: the names of logits [T, N, 1, E] and their tangents at the tile.
        operands: what is read of memory.
        shape: of the logits.
        tile: whose columns are all E.
        type_: of the numbers.
    """
    at = {role: operands.get(plane) for role, plane in zip(KERNELS[part.kernel].reads, part.reads, strict=True)}
    given, (_, samples, _, elements) = part.constants, shape
    target, c, seed = at["target"], at["c"], at.get("seed")
    assert target is not None
    ones = f"tl.full([{tile.rows}, 1], 1.0, {type_})"
    factor = _row(c, type_) if c is not None else ones if given.total else f"{ones} / {samples}"
    lines = [
        f"factor = {factor}",
        f"seed = {ones if seed is None else _row(seed, type_)}",
        _target(part, target, type_),
    ]
    mode = 0 if part.kernel == "loss.forward" else 1
    flags = f"{zt is not None}, {seed is not None}"
    operand = f"{z}, {zt or z}, target, factor, seed, live"
    if given.kind in (_IDS, SOFT):
        call = f"class_tile({operand}, c, {elements}, {mode}, {given.kind == _IDS}, {given.p0!r}, {flags})"
    else:
        call = f"element_tile({operand}, {elements}, {mode}, {given.kind}, {given.p0!r}, {given.total}, {flags})"
    return [*lines, f"each, grad = {call}"], ["each", "grad"] if mode == 0 else ["grad"]


def _address(operand: Operand) -> str:
    """Of the sample's first number  # [rows, 1]"""
    sizes = zip("tn", operand.shape, operand.strides, strict=False)
    return " + ".join([operand.name, *(f"{index} * {stride}" for index, size, stride in sizes if size > 1), "m * 0"])


def _row(operand: Operand, type_: str) -> str:
    """One number a sample, or a task."""
    return f"tl.load({_address(operand)}, mask=live_m, other=0.0).to({type_})"


def _target(part: Part, target: Operand, type_: str) -> str:
    if part.constants.kind == _IDS:
        return f"target = tl.load({_address(target)}, mask=live_m, other=0).to(tl.int64)"
    step = target.strides[2] if len(target.shape) > 2 else 0
    return f"target = tl.load({_address(target)} + c * {step}, mask=live, other=0.0).to({type_})"
