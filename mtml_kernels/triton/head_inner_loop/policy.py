"""The launch policy of `head_inner_loop`: a shape's blocks, and which shapes fit. Does not import triton."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NARROW", "WIDTH", "Launch", "launch_of", "refusal"]

SMALLEST = 16  # of the depth of a matrix product
WIDTH = 32  # S + C that `products_kernel` holds in registers
LARGEST = 4096  # 32-bit words of a block [S, C], padded
NARROW = 8  # classes that need no padding to SMALLEST, and that `chain_kernel` writes out one by one


class Launch(NamedTuple):
    """S and C padded, query samples of a block, warps of a program, whether gram stays on chip, and whether products of
    the features are launches of `features.py`.
    """

    support: int
    classes: int
    block: int
    warps: int
    on_chip: bool
    narrow: bool


def launch_of(support: int, classes: int, itemsize: int) -> Launch:
    """The launch policy.

    The state of all K steps stands in the registers of one program: on the way back eleven blocks [S, C] (zs, y, a, b,
    p, x, dz, da, db, dzs, r). With a warp for every 256 words a thread has 8 words of each, which 255 registers hold
    beside the operands of a product. That ends at 8 warps and 2048 words: 16 warps share out 128 registers a thread,
    and of 4096 words (100 samples of 20 classes) cuobjdump finds up to 0.6 KB a thread in local memory; beyond, hardly
    anything would be on chip, and the shape is refused. Doubles are two words, and spill from 1024 words on.
    Products stay off the tensor cores, whose TF32 loses digits; a thread then holds whole rows and columns of their
    operands. gram [S, S] is one of them up to 32 samples of float32 (5 classes of 5 shots: 137 of 255 registers, 7 KB
    of shared memory). From there on it is read from L1 or L2, 16 columns at a time, and a from the history.
    Up to 8 classes are padded to 8: only the depth of a product is 16 at least, and where classes are its depth, those
    of all steps are one product (`narrow_gram_cotangent`). Predicted: 19 instead of 33 us of anil_head on an H200.
    Shared memory holds the operands of one product, 18 KB at most, where sm120 has 99 KB, sm80 163, others 227.
    The query set passes in blocks of 16: neither Q nor D nor K has a limit. Only one task's shape plays a part, so that
    its bits do not depend on the tasks beside it. Reasoned, not yet measured.

    Raises:
        ValueError: S and C are refused.
    """
    why = refusal(support, classes, itemsize)
    if why is not None:
        raise ValueError(f"features_support: {why}. Way out: backend='reference', or smaller support sets")
    rows, columns = _padded(support), NARROW if classes <= NARROW else _padded(classes)
    words = rows * columns * itemsize // 4
    warps = 4 if words <= 512 else 8 if words <= 2048 else 16
    on_chip = rows * itemsize <= 128 and columns <= 32
    return Launch(rows, columns, SMALLEST, warps, on_chip, on_chip and classes <= NARROW and support + classes <= WIDTH)


def refusal(support: int, classes: int, itemsize: int) -> str | None:
    """Why heads of this shape do not fit `launch_of`, or None."""
    rows, columns = _padded(support), _padded(classes)
    if rows * columns * itemsize // 4 <= LARGEST:
        return None
    return (
        f"expected S x C of at most {LARGEST * 4 // itemsize}, each rounded up to a power of two from {SMALLEST} on (a "
        f"task's state stands in registers), got S = {support}, C = {classes}: {rows} x {columns}"
    )


def _padded(size: int) -> int:
    """The next power of two from SMALLEST on. By comparisons, for torch.compile may bring a symbol."""
    padded = SMALLEST
    while padded < size:
        padded *= 2
    return padded
