"""What one launch of the multi-head losses knows about its heads: a table with a row of 64-bit words for every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from mtml_kernels.schema.losses import CLASS_KINDS, HeadLoss

__all__ = [
    "FIELDS",
    "FINISH_BLOCK",
    "INTEGERS",
    "LABELS",
    "LARGEST",
    "NORM_BLOCK",
    "REGISTERS",
    "TILES",
    "Tile",
    "tile_of",
    "upload",
    "word",
]

INTEGERS = (
    "logits",  # addresses: 0 where there is none
    "grad",
    "target",
    "sample_weights",
    "weights",  # class weights, or bce's positive weights of one sample's elements
    "kind",  # index in KINDS
    "tile",  # index in TILES
    "alone",  # 1 where each of its programs sums the norm itself
    "hard",  # 1 where the target is class ids
    "rows",  # softmax kinds: rows N * I; others: elements N * E of the target
    "classes",  # C; gaussian_nll: outputs O
    "inner",  # distance I between the classes of a row; others: elements E of a sample
    "samples",  # what has a weight of its own in the norm: N * I rows, or N samples
    "repeat",  # consecutive samples that share one sample weight
    "ignore",
    "tiles",
    "each",  # consecutive tiles that one program computes
    "first",  # the head's first program, and their number
    "blocks",
    "norm_first",  # the same in the launch that sums the norms
    "norm_blocks",
    "slot",  # where its loss goes
    "done",  # how many of its programs have stored their loss (kernels count)
    "bad_row",  # the first row with a label out of range (kernels write it), else `samples`
)
FLOATS = ("smoothing", "delta", "norm", "share")  # norm: where no block sums it; share: of an element in its sample
FIELDS = np.dtype([(name, "<i8") for name in INTEGERS] + [(name, "<f8") for name in FLOATS])


def word(name: str) -> Any:
    """Where a field stands in a head's row, for kernels."""
    return tl.constexpr((*INTEGERS, *FLOATS).index(name))


NORM_BLOCK = 1024
FINISH_BLOCK = 256
REGISTERS = 128  # of a thread: what lets 4 programs of 4 warps stand on a multiprocessor
# Kernels add a block's lanes to a remainder below a size in 32 bits; no tile is wider than 2^13.
LARGEST = 2**31 - 2**13


class Tile(NamedTuple):
    """Rows x classes (or `rows` elements), computed by so many warps, `each` of them by one program in turn."""

    rows: int
    classes: int
    warps: int
    each: int


_ROWS = (Tile(32, 16, 4, 4), Tile(8, 64, 4, 4), Tile(1, 1024, 4, 2))
_PIXELS = Tile(128, 8, 4, 1)
TILES = (*_ROWS, Tile(1, 2048, 8, 1), _PIXELS, Tile(1024, 0, 4, 4), *_ROWS, Tile(1, 4096, 16, 1), _PIXELS)
TINY, NARROW, WIDE, VOCABULARY, PIXELS, ELEMENTS = range(6)
LABELS = 6  # what is added to a tile's number where the target is class ids, without smoothing and weights


def tile_of(spec: HeadLoss, classes: int, inner: int, itemsize: int) -> int:
    """The launch policy: which tile a head's shape takes.

    A tile is 512 to 2048 values, 4 to 8 for each thread: enough loads in flight at 4 programs a multiprocessor (no more
    than 128 registers a thread), and a small head (32 rows of 10 classes) is one program. Rows of more classes than
    the tile loop over chunks; the second pass finds the logits in L1 or L2. Per-pixel heads put the pixels along the
    warp, for there they are neighbours in memory. A vocabulary's rows (32 KB and more) take a launch of their own with
    8 warps a row: two rows fit a multiprocessor then (about 100 registers), and all rows at work (132 x 2 x 128 KB =
    34 MB at 32000 float32 classes) stay in a 50 MB L2 until their second pass; with 4 warps twice as many would not.
    For labels alone half the registers do, and a row has 16 warps for the same reason.
    A program starts with four loads that wait for one another (head, address, label, logit: 2 us or so), as long as 4
    programs a multiprocessor need for 4 KB each at full bandwidth: small tiles share a program by fours.
    Shapes of other heads play no part, so that a head's bits do not depend on them. Reasoned, not yet measured.
    """
    if spec.kind not in CLASS_KINDS:
        return ELEMENTS
    if inner > 1:
        return PIXELS
    if classes * itemsize >= 32768:
        return VOCABULARY
    return TINY if classes <= 16 else NARROW if classes <= 256 else WIDE


def upload(tables: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Each table's words, int64 [heads, words], on the device, by one copy that nobody waits for."""
    if not tables:
        return []
    words = torch.from_numpy(np.concatenate(tables).view(np.int64).reshape(-1, len(INTEGERS) + len(FLOATS)))
    if device.type == "cuda":
        words = words.pin_memory().to(device, non_blocking=True)
    return list(words.split([len(table) for table in tables]))
