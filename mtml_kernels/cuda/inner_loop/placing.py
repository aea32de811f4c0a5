"""Where a task's memories lie: on the chip as long as they are needed, in the workspace what does not fit."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from mtml_kernels.cuda.inner_loop.instructions import Instruction, Memory

__all__ = ["Placed", "TooLarge", "placed"]

ALIGNMENT = 32  # bytes: four numbers of double precision, which products read at once


class TooLarge(ValueError):
    """A program that needs more than there is, in words."""


class Placed(NamedTuple):
    """Bytes from the start of the chip's planes, or of the workspace's, for every memory; and how many in all."""

    chip: dict[Memory, int]
    workspace: dict[Memory, int]
    chip_bytes: int
    workspace_bytes: int


class _Life(NamedTuple):
    memory: Memory
    first: int  # phases
    last: int
    bytes: int
    uses: int


def _lives(phases: Sequence[Sequence[Instruction]]) -> list[_Life]:
    found: dict[Memory, list[int]] = {}
    for at, phase in enumerate(phases):
        for host in phase:
            for instruction in (host, *host.stages):
                for operand in (*instruction.read(), *instruction.written()):
                    if operand.memory.home is None:
                        found.setdefault(operand.memory, []).append(at)
    return [_Life(memory, min(at), max(at), _bytes(memory), len(at)) for memory, at in found.items()]


def _bytes(memory: Memory) -> int:
    return max(1, -(-memory.elements * memory.dtype.itemsize // ALIGNMENT)) * ALIGNMENT


def _packed(lives: Sequence[_Life]) -> tuple[dict[Memory, int], int]:
    """The largest first, each at the lowest place that nothing takes while it lives."""
    placed: list[tuple[int, _Life]] = []
    for life in sorted(lives, key=lambda life: (-life.bytes, life.first)):
        at = 0
        for start, other in placed:  # by their place
            if other.first <= life.last and life.first <= other.last:
                if start - at >= life.bytes:
                    break
                at = max(at, start + other.bytes)
        insort(placed, (at, life), key=lambda pair: pair[0])
    return {life.memory: at for at, life in placed}, max((at + life.bytes for at, life in placed), default=0)


def _most_at_once(lives: Sequence[_Life]) -> int:
    """Bytes that live in one phase, which no way of packing goes below."""
    changes = [0] * (max((life.last for life in lives), default=0) + 2)
    for life in lives:
        changes[life.first] += life.bytes
        changes[life.last + 1] -= life.bytes
    return max(accumulate(changes))


def placed(phases: Sequence[Sequence[Instruction]], chip_bytes: int) -> Placed:
    """On a chip of so many bytes. To the workspace goes first what lies there longest for the fewest uses."""
    lives = sorted(_lives(phases), key=lambda life: life.uses / ((life.last - life.first + 1) * life.bytes))
    for spilled in _counts(len(lives)):
        if _most_at_once(lives[spilled:]) > chip_bytes:
            continue
        chip, used = _packed(lives[spilled:])
        if used <= chip_bytes:
            workspace, more = _packed(lives[:spilled])
            return Placed(chip, workspace, used, more)
    raise TooLarge("the chip has no room")


def _counts(most: int) -> list[int]:
    """0, then how many to put away: each time a twentieth of them more, at last all."""
    step = max(1, most // 20)
    return [*range(0, most, step), most]
