"""A launch's time from its compiled kernel.

    time     launch + max(issue, matrix, bytes, latency)
    issue    the busiest of a multiprocessor's units: schedulers, multiply-adds, integers, special functions, memory
    matrix   multiply-adds of the matrix units / their rate
    bytes    the tensors' bytes / bandwidth, of the L2 cache where all of them fit it
    latency  waves * the chain of one program (chain.py), and at least the longest chain

A wave is as many programs as the chip holds by registers and shared memory. Programs are spread evenly over
multiprocessors, or over the places of a wave, of which the one with most counts; where jobs differ, each has the mean
of them. PyTorch's own kernels have launch and bytes alone, its
products the first prediction. Left out: bank conflicts and reads that do not use whole
sectors, rare branches, long programs that start last, what a cold L2 costs, the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.sass.chain import clocks_of
from bench.sass.chips import ALU_LANES, MEMORY_WORDS, SCHEDULERS, SPECIAL_LANES, Chip
from bench.sass.code import Code
from bench.sass.counting import LANES, Counts, check, count
from bench.sass.paths import Path, paths_of
from bench.sass.recording import Move, Recorded
from mtml_kernels.schedule.cost import Cost
from mtml_kernels.schedule.devices import LAUNCH_SECONDS
from mtml_kernels.schedule.predict import predict

__all__ = ["BOUNDS", "Launch", "bytes_seconds", "launch_of", "move_of"]

BOUNDS = ("launch", "issue", "matrix", "bytes", "latency")


class Launch(NamedTuple):
    """Seconds of one launch by what may hold it up, and what was counted. `issued` and `fma`: of all warps.

    longest: programs of the job whose chain is the longest, and how often their loops go round in all.
    """

    name: str
    launch: float
    issue: float
    matrix: float
    bytes: float
    latency: float
    programs: int = 0
    resident: int = 0
    waves: float = 0.0
    issued: int = 0
    fma: int = 0
    moved: int = 0
    longest: tuple[int, int] = (0, 0)

    @property
    def seconds(self) -> float:
        """From its start to the start of the next one."""
        return self.launch + max(self[2:6])

    @property
    def bound(self) -> str:
        """What takes most of it, one of `BOUNDS`."""
        return max(zip(self[1:6], BOUNDS, strict=True))[1]

    def __str__(self) -> str:
        share = self.fma / self.issued if self.issued else 0.0
        work = f"{self.programs:6d} programs, {self.resident:2d} held, {self.waves:6.2f} waves"
        counted = f"{self.issued / 1e6:9.4f} M issued, {share:4.0%} FMA, {self.moved / 1e6:8.3f} MB"
        longest = f"longest {self.longest[0]:5d} programs of {self.longest[1]:4d} turns"
        return f"{1e6 * self.seconds:9.2f} us {self.bound:8s} {work}, {counted}, {longest}  {self.name}"


def bytes_seconds(size: int, chip: Chip) -> float:
    """Of so many bytes, from the L2 cache where it holds them."""
    device = chip.device
    return size / (device.l2_bandwidth if size <= device.l2_bytes else device.bandwidth)


def _unit_clocks(counts: Counts, warps: int, chip: Chip) -> float:
    """Clocks of a multiprocessor for one program, of the unit that it keeps busy longest."""
    by, lanes = counts.by_pipe, warps * LANES
    multiplying = by["fma"] * lanes / chip.fma_lanes + by["mad"] * lanes / ALU_LANES
    return max(
        warps * counts.issued / SCHEDULERS,
        multiplying,
        by["alu"] * lanes / ALU_LANES,
        by["special"] * lanes / SPECIAL_LANES,
        counts.words * lanes / MEMORY_WORDS,
    )


def _matrix_clocks(counts: Counts, warps: int, chip: Chip) -> float:
    asynchronous = counts.matrix - counts.synchronous
    return warps * (asynchronous + counts.synchronous / chip.synchronous) / chip.matrix_macs


def _busiest(paths: Sequence[Path], clocks: Sequence[float], places: int) -> float:
    """Clocks of the place (a multiprocessor, or room for one program) with most programs; at least the longest's."""
    programs = sum(path.programs for path in paths)
    total = sum(path.programs * each for path, each in zip(paths, clocks, strict=True))
    own = -(-programs // places)
    return max(max(clocks, default=0.0), total / max(programs, 1) * own)


def launch_of(launch: Recorded, code: Code, chip: Chip) -> Launch:
    """One launch's time. Raises ValueError where its loops cannot be followed, or miss multiply-adds."""
    paths = [path for path in paths_of(launch, code) if path.programs]
    for path in paths:
        check(path, code.warps)
    counted = [count(path) for path in paths]
    moved = launch.bytes(code.used)
    resident = chip.resident(code.registers, code.shared, code.warps)
    processors = chip.device.processors
    times = chip.latencies
    far = times.l2 if moved <= chip.device.l2_bytes else times.memory
    chains = [clocks_of(path.nodes, chip, code.warps, far) for path in paths]
    longest = max(zip(chains, paths, strict=True), key=lambda pair: pair[0], default=(0.0, Path(0, (), ())))[1]
    issue = _busiest(paths, [_unit_clocks(counts, code.warps, chip) for counts in counted], processors)
    matrix = _busiest(paths, [_matrix_clocks(counts, code.warps, chip) for counts in counted], processors)
    hertz = chip.device.hertz
    every = [(path.programs * code.warps, counts) for path, counts in zip(paths, counted, strict=True)]
    return Launch(
        name=launch.name,
        launch=LAUNCH_SECONDS,
        issue=issue / hertz,
        matrix=matrix / hertz,
        bytes=bytes_seconds(moved, chip),
        latency=_busiest(paths, chains, processors * resident) / hertz,
        programs=launch.programs,
        resident=resident,
        waves=launch.programs / (processors * resident),
        issued=sum(many * counts.issued for many, counts in every),
        fma=sum(many * counts.fma for many, counts in every),
        moved=moved,
        longest=(longest.programs, sum(loop.turns for loop in longest.loops)),
    )


def move_of(move: Move, chip: Chip) -> Launch:
    """One of PyTorch's own kernels: of its bytes, or by the first prediction of a product of float32."""
    seconds, name = bytes_seconds(move.bytes, chip), f"torch {move.name}"
    if move.product is None:
        return Launch(name, LAUNCH_SECONDS, 0.0, 0.0, seconds, 0.0, moved=move.bytes)
    times, product = predict(Cost((move.product,), 0, 0, 0), chip.device), move.product
    shape = f"{product.batch} x [{product.rows}, {product.cols}] of {product.depth}"
    return Launch(f"{name} {shape}", LAUNCH_SECONDS, times.arithmetic, 0.0, seconds, times.latency, moved=move.bytes)
