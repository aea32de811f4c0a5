"""The lines by which a job's programs add up and store their shares of a batch normalisation's sums."""

from __future__ import annotations

from mtml_kernels.triton.inner_loop.jobs import Operand, Share
from mtml_kernels.triton.inner_loop.shares import terms

__all__ = ["adding", "starting", "storing"]

_MOMENTS = ("mean", "left", "rest")


def _names(i: int, share: Share, plane: Operand) -> list[str]:
    """Of the numbers that share i has of every column."""
    if share.part.kernel == "norm.stats":
        return [f"{name}{i}" for name in _MOMENTS]
    return [f"sum{i}_{j}" for j in range(plane.shape[0])]


def starting(i: int, share: Share, plane: Operand, cols: int, type_: str) -> list[str]:
    """Before the first tile."""
    zeros = [f"{name} = tl.zeros([1, {cols}], {type_})" for name in _names(i, share, plane)]
    return [*zeros, f"seen{i} = 0"] if share.part.kernel == "norm.stats" else zeros


def adding(i: int, share: Share, plane: Operand, data: dict[str, str | None]) -> list[str]:
    """Of a tile, of whose `count` rows `data` has the names by role."""
    names = _names(i, share, plane)
    if share.part.kernel == "norm.stats":
        state = f"{', '.join(names)}, seen{i}"
        return [f"{state} = add_moments({state}, {data['x']}, live, count)"]
    found = terms(share.part, data.get("d"), str(data["dt"]), str(data["xhat"]), data.get("xhat_t"))
    return [f"{name} += column_sum({term}, live)" for name, term in zip(names, found, strict=True)]


def storing(i: int, share: Share, plane: Operand) -> list[str]:
    """After the last tile."""
    lines = []
    for j, name in enumerate(_names(i, share, plane)):
        task, chunk = f"({j * plane.shape[1]} + task) * {plane.strides[1]}", f"(chunk + {share.first})"
        address = f"{plane.name} + {task} + {chunk} * {plane.shape[3]} + c"
        lines.append(f"tl.store({address}, {name}, mask=live_c)")
    return lines
