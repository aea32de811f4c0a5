"""``python -m bench predict --sass heads``: launches of linear heads and of multi-head losses, beside their floor.

The floor: a launch there and one back, and the longer of the FLOPs at the chip's peak in float32 and the bytes of all
arguments and results. Predicted, and no measurement.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.sass.chips import CHIPS, Chip
from bench.sass.emulation.launches import Ran, emulated
from bench.sass.heads.cases import DEFAULT, NAMES, Case, case_of
from bench.sass.heads.model import time_of
from bench.sass.model import BOUNDS, Launch, bytes_seconds, move_of
from mtml_kernels.schedule.devices import LAUNCH_SECONDS
from mtml_kernels.triton.backends import interpreted

__all__ = ["COLUMNS", "GROUP", "NAMES", "Prediction", "predicted", "report"]

GROUP = "heads"
COLUMNS = ("workload", "chip", "launches", "us", *BOUNDS, "mostly", "gflop", "mbytes", "floor_us", "share")
LEAST_LAUNCHES = 2  # there, and back


class Prediction(NamedTuple):
    """Of a case on a chip: its launches in their order."""

    case: Case
    chip: Chip
    launches: tuple[Launch, ...]

    @property
    def seconds(self) -> float:
        """Of all launches, one after the other."""
        return sum(launch.seconds for launch in self.launches)

    @property
    def by_bound(self) -> dict[str, float]:
        """The same, split by what bounds each launch."""
        return {name: sum(one.seconds for one in self.launches if one.bound == name) for name in BOUNDS}

    @property
    def work(self) -> tuple[float, str]:
        """Seconds of the FLOPs at the chip's peak in float32, or of the bytes; and which of the two is longer."""
        arithmetic, moving = self.case.flops / self.chip.device.fp32, bytes_seconds(self.case.bytes, self.chip)
        return (arithmetic, "FP32") if arithmetic > moving else (moving, "bytes")

    @property
    def floor(self) -> float:
        """The least that any form takes that has a launch there and one back."""
        return LEAST_LAUNCHES * LAUNCH_SECONDS + self.work[0]

    def row(self, chip: str) -> tuple[str, ...]:
        """By COLUMNS, times in microseconds."""
        split, (work, what) = self.by_bound, self.work
        times = [f"{1e6 * seconds:.1f}" for seconds in (self.seconds, *split.values())]
        counted = (f"{self.case.flops / 1e9:.3f}", f"{self.case.bytes / 1e6:.2f}", f"{1e6 * self.floor:.1f}")
        share = f"{work / self.seconds:.0%} {what}"
        return (
            self.case.name,
            chip,
            str(len(self.launches)),
            *times,
            max(split, key=split.__getitem__),
            *counted,
            share,
        )

    def worst(self, count: int) -> list[tuple[int, Launch]]:
        """The longest kinds of launches, all of one kind together: (how many, one of them)."""
        kinds: dict[Launch, int] = {}
        for launch in self.launches:
            kinds[launch] = kinds.get(launch, 0) + 1
        return sorted(((many, one) for one, many in kinds.items()), key=lambda kind: -kind[0] * kind[1].seconds)[:count]


def predicted(name: str, chip: str, folder: Path | None = None) -> Prediction:
    """Compile what is not in the folder, run programs of it, and predict. Raises ValueError where Triton interprets."""
    if interpreted():
        raise ValueError("TRITON_INTERPRET: expected not to be set, for interpreted kernels are not compiled")
    own, case = CHIPS[chip], case_of(name)
    with emulated(own, case.tensors, folder=folder) as found:
        case.run()
    launches = tuple(time_of(one, own) if isinstance(one, Ran) else move_of(one, own) for one in found)
    return Prediction(case, own, launches)


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:18s} " + " ".join(f"{cell:>9s}" for cell in rest)


def report(names: Iterable[str], chips: Sequence[str], worst: int, out: str = "") -> Iterator[str]:
    """The table, line by line as it is found. GROUP stands for the default cases."""
    every = [name for given in names for name in (DEFAULT if given == GROUP else (given,))]
    rows = []
    yield f"heads: a step of the op alone; floor: {LEAST_LAUNCHES} launches and the longer of its FLOPs and its bytes"
    yield _line(COLUMNS)
    for name, chip in itertools.product(every, chips):
        found = predicted(name, chip)
        rows.append(found.row(chip))
        yield _line(rows[-1])
        for many, launch in found.worst(worst):
            yield f"  {many:4d} x {launch}"
    if out:
        with Path(out).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        yield f"wrote {out}"
