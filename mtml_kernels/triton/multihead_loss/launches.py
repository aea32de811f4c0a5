"""Which launches a list of heads takes, and their tables but for the addresses: made once for heads of these shapes."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from mtml_kernels.schema.losses import CLASS_KINDS, HeadLoss
from mtml_kernels.schema.losses import HEAD_KINDS as KINDS
from mtml_kernels.triton.multihead_loss.table import FIELDS, LABELS, LARGEST, NORM_BLOCK, TILES, VOCABULARY, tile_of

__all__ = ["Group", "HeadShape", "launches"]

# A head of so few samples and programs sums its norm in each of them: cheaper than a launch before theirs.
ALONE_SAMPLES, ALONE_PROGRAMS = 512, 4


class HeadShape(NamedTuple):
    """What of a head decides its launch. `aligned`: all its addresses are multiples of 16 bytes. `weighted`: its
    classes have weights.
    """

    spec: HeadLoss
    shape: tuple[int, ...]
    dtype: torch.dtype
    hard: bool  # the target is class ids
    sample_weights: int  # how many there are; -1: none
    aligned: bool
    weighted: bool = False

    def layout(self) -> tuple[int, int, int, int]:
        """(rows, classes, inner, samples) as in the table."""
        shape = self.shape
        if self.spec.kind in CLASS_KINDS:
            dim = self.spec.class_dim % len(shape)
            inner = math.prod(shape[dim + 1 :])
            rows = math.prod(shape[:dim]) * inner
            return rows, shape[dim], inner, rows
        pair = 2 if self.spec.kind == "gaussian_nll" else 1
        inner = math.prod(shape[1:]) // pair
        return shape[0] * inner, shape[-1] // 2 if pair == 2 else 1, inner, shape[0]

    @property
    def tile(self) -> int:
        _, classes, inner, _ = self.layout()
        tile = tile_of(self.spec, classes, inner, self.dtype.itemsize)
        labels_alone = self.hard and not (self.weighted or self.spec.label_smoothing)
        return tile + LABELS if labels_alone else tile

    @property
    def wide_loads(self) -> bool:
        """True where a vocabulary's rows may be read 16 bytes at a time."""
        return self.tile % LABELS == VOCABULARY and self.aligned and self.layout()[1] % 8 == 0

    def fill(self, slot: int, row: Any) -> None:
        """Writes everything but addresses and the places in the launch into its row of the table."""
        rows, classes, inner, samples = self.layout()
        spec, mean, tile = self.spec, self.spec.reduction == "mean", TILES[self.tile]
        repeat = max(samples // max(self.sample_weights, 1), 1) if self.sample_weights >= 0 else 1
        # the furthest offset in 32 bits: 128 pixels may lie in the second image
        if max(inner, repeat, classes * (2 * inner + 128) if spec.kind in CLASS_KINDS else classes) > LARGEST:
            raise ValueError(
                f"logits: head {slot} of shape {list(self.shape)} needs offsets above 2^31; cut its rows up"
            )
        row["kind"], row["tile"], row["hard"], row["slot"] = KINDS.index(spec.kind), self.tile, self.hard, slot
        row["rows"], row["classes"], row["inner"], row["samples"] = rows, classes, inner, samples
        row["repeat"], row["bad_row"] = repeat, samples
        row["ignore"] = spec.ignore_index if self.hard else -1  # other targets read as label 0
        row["smoothing"] = spec.label_smoothing if spec.kind == "cross_entropy" else 0.0
        row["delta"], row["norm"] = spec.delta, samples if mean else 1
        row["share"] = 1 / max(inner, 1) if mean else 1.0
        if math.prod(self.shape) == 0:
            return
        row["each"], row["tiles"] = tile.each, -(-rows // tile.rows)
        row["blocks"] = -(-row["tiles"] // tile.each)
        if mean and (self.hard or self.sample_weights >= 0):
            row["alone"] = samples <= ALONE_SAMPLES and row["blocks"] <= ALONE_PROGRAMS
            row["norm_blocks"] = 0 if row["alone"] else -(-samples // NORM_BLOCK)


class Group(NamedTuple):
    """Heads that share a launch: their places in the list, and their table without the addresses."""

    members: list[int]
    table: Any
    norm_programs: int
    programs: int
    used: int  # bit i: a head takes tile i
    warps: int
    wide_loads: bool
    empty: bool  # some head has no programs


@functools.lru_cache(256)
def launches(heads: tuple[HeadShape, ...]) -> list[Group]:
    """The launches of these heads. A head's launch is decided by the head itself, so that its bits depend on no other.

    Cached: 64 heads take 1 ms, and 0.1 ms when they are found here.
    """
    groups: dict[Any, list[int]] = {}
    for slot, head in enumerate(heads):
        groups.setdefault((head.dtype, TILES[head.tile].warps, head.wide_loads), []).append(slot)
    return [_group(heads, members, warps, wide) for (_, warps, wide), members in groups.items()]


def _group(heads: tuple[HeadShape, ...], members: list[int], warps: int, wide_loads: bool) -> Group:
    table = np.zeros(len(members), FIELDS)
    for row, slot in zip(table, members, strict=True):
        heads[slot].fill(slot, row)
    for first, blocks in (("first", "blocks"), ("norm_first", "norm_blocks")):
        table[first] = np.cumsum(table[blocks]) - table[blocks]
    used = sum(1 << tile for tile in {heads[slot].tile for slot in members})
    programs, empty = int(table["blocks"].sum()), bool((table["blocks"] == 0).any())
    return Group(members, table, int(table["norm_blocks"].sum()), programs, used, warps, wide_loads, empty)
