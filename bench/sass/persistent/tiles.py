"""Perceptrons whose tasks are cut into tiles, by emulation: the first block of every kind of launch.

    time     ends + sum over launches of (gap + rounds' reads + max(latency, work, writes))
    reads    bytes that a multiprocessor's blocks copy onto the chip, by its share of the second-level cache's bandwidth
    writes   sectors of global memory that they write, or read into registers, likewise

A launch begins when the one before it has ended, and nothing hides what a block copies. Latency and work are those of
model.py, of blocks instead of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.sass.chips import Chip
from bench.sass.emulation.clocks import Clocks, Phase
from bench.sass.persistent.kernel import Kernel
from bench.sass.persistent.model import GAP_SECONDS, LAUNCH_SECONDS, Time, summed
from bench.sass.persistent.where import shares
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall
from mtml_kernels.cuda.inner_loop.predicted import Clocks as BlockClocks
from mtml_kernels.cuda.inner_loop.predicted import time_of_tiles

__all__ = ["RanTiles", "TileLaunch", "time_of_call"]


class TileLaunch(NamedTuple):
    """A kind of launch: how often it is there, blocks, how many a multiprocessor holds, and the first one's clocks."""

    name: str
    times: int
    kernel: Kernel
    threads: int
    blocks: int
    resident: int
    clocks: Clocks

    def time(self, chip: Chip) -> Time:
        """Of one of them, without what lies between two."""
        return time_of_tiles(self.summed(), chip.device, self.blocks, self.resident)

    def summed(self) -> BlockClocks:
        """Of its first block."""
        clocks = self.clocks
        moved = float(len(clocks.read) + len(clocks.written))
        return summed(clocks.phases)._replace(copied=4.0 * clocks.copied, sectors=moved)


class RanTiles(NamedTuple):
    """A call by tiles: every kind of its launches."""

    widths: tuple[int, ...]
    tile: int  # samples
    call: MlpCall
    launches: tuple[TileLaunch, ...]

    @property
    def threads(self) -> int:
        """Of the largest block."""
        return max(launch.threads for launch in self.launches)

    @property
    def phases(self) -> list[Phase]:
        """Of the first blocks of all launches, each kind once."""
        return [phase for launch in self.launches for phase in launch.clocks.phases]

    def lines(self, chip: Chip) -> Iterator[str]:
        """What every kind of launch takes, where its clocks go, and how many registers it has."""
        for launch in self.launches:
            time = launch.time(chip)
            yield (
                f"  {launch.times} x {launch.name}: {1e6 * time.seconds:.1f} us, {time.unit}; {launch.blocks} blocks "
                f"of {launch.threads} threads, {time.blocks} on a multiprocessor, {launch.kernel.registers} registers"
            )
            spent = ", ".join(f"{name} {share:.0%}" for name, share in shares(launch.kernel, launch.clocks, 6))
            yield f"    clocks of warps: {spent}"


def time_of_call(launches: Sequence[TileLaunch], chip: Chip) -> Time:
    """Of a call; its bound is that of the launches that take the longest."""
    times = [launch.times * launch.time(chip).seconds for launch in launches]
    longest = launches[max(range(len(times)), key=lambda i: times[i])].time(chip)
    gaps = sum(launch.times for launch in launches) * GAP_SECONDS
    return longest._replace(seconds=sum(times) + gaps + LAUNCH_SECONDS - GAP_SECONDS)
