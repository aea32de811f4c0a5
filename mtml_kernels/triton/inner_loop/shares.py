"""Sums of a batch normalisation as shares: a launch that makes their operand stores what each of its programs adds up.

A second launch puts the shares together, in their order. How many rows a share has hangs on one task's shape alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtml_kernels.program.layers.norm import Norm
from mtml_kernels.schedule.call import ABSENT, Part, Plane
from mtml_kernels.schedule.kernels import KERNELS, Normalisation
from mtml_kernels.triton.inner_loop import policy
from mtml_kernels.triton.inner_loop.jobs import Job, Launch, Share, Space, data_of
from mtml_kernels.triton.inner_loop.policy import LARGEST, blocks, shared_tile

__all__ = ["FINISHES", "Finish", "Shared", "makers", "shared", "terms"]

FINISHES = frozenset(
    f"{name}.finish" for name in ("norm.stats", "norm.sums", "norm.stats_tangent", "norm.sums_tangent")
)


class Finish(NamedTuple):
    """`rows` were added up, `chunk` by every program but the last."""

    given: Normalisation
    rows: int
    chunk: int


class Shared(NamedTuple):
    """The plane of the shares, which is the next one, and the part that puts them together."""

    plane: Plane
    finish: Part


def shared(opened: Sequence[Launch], part: Part, planes: Sequence[Plane]) -> Shared | None:
    """The jobs that make its operands store shares from now on; None where they have not all that it takes at hand."""
    data = [planes[plane] for plane in data_of(part).values() if plane != ABSENT]
    found = makers(opened, part)
    if not (data and found and _by_tiles(part) and _at_hand(found, data)):
        return None
    shape, dtype = data[0].shape, "tl.float64" if data[0].dtype == torch.float64 else "tl.float32"
    rows = shape[1] * shape[2]
    apart = [dataclasses.replace(job, space=Space(shape)) for job in found]  # a share is of one task's rows
    tiles = [shared_tile(job, dtype) for job in apart]
    counts = [blocks(job, tile)[0] for job, tile in zip(apart, tiles, strict=True)]
    uneven = part.kernel == "norm.stats" and len(found) > 1  # a moment is put together by its chunk's rows
    if rows <= LARGEST or sum(counts) > policy.SHARES or uneven:
        return None
    for i, job in enumerate(found):
        job.space = Space(shape)
        job.shares.append(Share(part, len(planes), sum(counts[:i])))
    return _plane_and_finish(part, planes, shape, sum(counts), Finish(part.constants, rows, tiles[0].chunk))


def _by_tiles(part: Part) -> bool:
    """Whether a part's sums are of columns, of which a tile has some whole."""
    return part.constants.kind == Norm.BATCH and data_of(part).get("dt") != ABSENT


def _at_hand(jobs: Sequence[Job], data: Sequence[Plane]) -> bool:
    """Whether the jobs make one plane, of the shape of all data, element by element."""
    one = len({job.first for job in jobs}) == 1 and (len(jobs) == 1 or jobs[0].first is not None)
    fit = all(job.space.shape == data[0].shape and job.pool is None and not job.summed for job in jobs)
    return one and fit and all(plane.shape == data[0].shape for plane in data)


def makers(opened: Sequence[Launch], part: Part) -> list[Job]:
    """The jobs of one launch that make operands of the part; none where several launches do."""
    found = [[job for job in launch.jobs if job.makes & set(part.reads)] for launch in opened]
    there = [jobs for jobs in found if jobs]
    return there[0] if len(there) == 1 else []


def _plane_and_finish(part: Part, planes: Sequence[Plane], shape: Sequence[int], chunks: int, finish: Finish) -> Shared:
    like = planes[next(plane for plane in part.writes if plane != ABSENT)]
    plane = dataclasses.replace(like, shape=(_numbers(part), shape[0], chunks, shape[3]), source=None)
    reads = (len(planes),) if part.kernel == "norm.stats" else (len(planes), *_affine(part))
    return Shared(plane, Part(f"{part.kernel}.finish", reads, part.writes, finish))


def _affine(part: Part) -> tuple[int, int]:
    """The weight, and its tangent where something is multiplied by it."""
    at = dict(zip(KERNELS[part.kernel].reads, part.reads, strict=True))
    return at.get("w", ABSENT), at["wt"] if _bent(part) else ABSENT


def _numbers(part: Part) -> int:
    """How many sums of a column there are."""
    return 3 if part.kernel == "norm.stats" else 4 if _bent(part) else 2


def _bent(part: Part) -> bool:
    """Whether the weight has a tangent, and there is the cotangent that it multiplies."""
    return part.kernel == "norm.sums_tangent" and ABSENT not in (part.reads[0], part.reads[-1])


def terms(part: Part, d: str | None, dt: str, xhat: str, xhat_t: str | None) -> list[str]:
    """What is summed: A1, A2, and where w has a tangent B1 and B2 of `norm_columns.column_kernel`."""
    along = f" + {d} * {xhat_t}" if d is not None and xhat_t is not None else ""
    found = [dt, f"{dt} * {xhat}{along}"]
    return [*found, str(d), f"{d} * {xhat}"] if _bent(part) else found
