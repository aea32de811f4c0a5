"""Which parts one kernel can do: a list of parts to a list of calls, each of which is one launch on a GPU.

A kernel owns tiles of its results. What it computes of a tile is at hand for whatever goes element by element: an
activation after a product, the gate of a gradient, the step along a weight gradient, the loss of rows that fit one
tile. What has to be summed over tiles first (statistics of a batch, a norm) ends the kernel, which may leave the tiles'
shares of sums of columns. Updates are elementwise and of every tensor alike, so that those of all tensors go along with
whichever product comes last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import ABSENT, Call, Part, Plane
from mtml_kernels.schedule.kernels import KERNELS, Normalisation

__all__ = ["grouped"]

ROW_TILE = 256  # features: rows of logits up to that are at hand in the product that makes them
# Before a product only what is cheap to do again, each time an operand is loaded.
_LIGHT = ("act.", "add.", "mul.forward", "affine.", "scale", "update.direction", "accumulate", "expand")


@dataclasses.dataclass
class _Group:
    parts: list[Part]
    where: str

    def writers(self) -> dict[int, Part]:
        """Which of its parts wrote a plane."""
        return {plane: part for part in self.parts for plane in part.writes if plane != ABSENT}

    def kinds(self) -> set[str]:
        """Of its parts that do something."""
        return {KERNELS[part.kernel].kind for part in self.parts} - {"free"}


def _sources(group: _Group, part: Part) -> list[Part]:
    """The parts of the group whose results this one reads, views looked through."""
    writers, found, seen = group.writers(), [], set[int]()
    queue = [plane for plane in part.reads if plane in writers]
    while queue:
        plane = queue.pop()
        if plane in seen:
            continue
        seen.add(plane)
        writer = writers[plane]
        if KERNELS[writer.kernel].kind == "free":
            queue += [p for p in writer.reads if p in writers]
        else:
            found.append(writer)
    return found


def _sums_whole_channels(part: Part) -> bool:
    """Whether a reduction ends within one program: batch statistics are a program's by channels."""
    return isinstance(part.constants, Normalisation) and part.constants.kind == Norm.BATCH


def _joins(group: _Group, part: Part, planes: Sequence[Plane]) -> bool:
    kind, kinds, sources = KERNELS[part.kernel].kind, group.kinds(), _sources(group, part)
    from_reduce = [p for p in sources if KERNELS[p.kernel].kind == "reduce"]
    if kind == "free" or not kinds:
        return True
    if kind == "point":
        is_update = part.kernel in ("update.step", "update.rule", "accumulate")
        return not from_reduce or (is_update and all(map(_sums_whole_channels, from_reduce)))
    if kind == "rows":
        width = max((planes[p].shape[-1] for p in part.reads if p != ABSENT and planes[p].shape), default=1)
        return not from_reduce and width <= ROW_TILE
    if kind == "reduce":
        whole = _sums_whole_channels(part) and bool(sources)
        return not kinds & ({"rows"} if whole else {"product", "rows"}) and not from_reduce
    return kinds <= {"point"} and all(
        p.kernel.startswith(_LIGHT) or KERNELS[p.kernel].kind == "free" for p in group.parts
    )


def grouped(parts: Sequence[tuple[str, Part]], planes: Sequence[Plane], keep: frozenset[int]) -> tuple[Call, ...]:
    """The calls in their order, each with the planes that nobody reads after it; those of `keep` outlive the list."""
    groups: list[_Group] = []
    for where, part in parts:
        if groups and _joins(groups[-1], part, planes):
            groups[-1].parts.append(part)
        else:
            groups.append(_Group([part], where))
    last: dict[int, int] = {}
    for at, group in enumerate(groups):
        for part in group.parts:
            last.update((plane, at) for plane in (*part.reads, *part.writes) if plane != ABSENT)
    drops: list[list[int]] = [[] for _ in groups]
    for plane, at in last.items():
        if plane not in keep and planes[plane].source is None:
            drops[at].append(plane)
    return tuple(Call(tuple(group.parts), group.where, tuple(drop)) for group, drop in zip(groups, drops, strict=True))
