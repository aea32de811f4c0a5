"""``python -m bench predict --sass``: a meta-step's launches, their time as compiled, and the first prediction.

The first prediction knows the schedule alone (`bench/report/predict.py`); this one the kernels that Triton makes of it.
Neither is a measurement.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.report.predict import predict
from bench.sass.chips import CHIPS, Chip
from bench.sass.code import cache_folder, code_of
from bench.sass.meta_steps import kernels_of
from bench.sass.model import BOUNDS, Launch, launch_of, move_of
from bench.sass.recording import Recorded
from bench.workloads import Workload, select
from mtml_kernels.schedule.devices import Precision

__all__ = ["Prediction", "Request", "lines", "predicted", "report", "write_csv", "write_launches"]

OF_A_LAUNCH = ("kernel", "us", "bound", "programs", "waves", "issued", "fma", "mbytes")
COLUMNS = ("workload", "chip", "precision", "calls", "first_us", "launches", "us", *BOUNDS, "mostly")


class Prediction(NamedTuple):
    """Of a meta-step: the first prediction's calls and seconds, and the launches."""

    workload: str
    chip: str
    precision: Precision
    calls: int
    first: float
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
    def bound(self) -> str:
        """What bounds the launches that take most of the time."""
        split = self.by_bound
        return max(split, key=lambda name: split[name])

    def row(self) -> tuple[str, ...]:
        """By COLUMNS, times in microseconds."""
        times = [f"{1e6 * self.by_bound[name]:.1f}" for name in BOUNDS]
        first, own = f"{1e6 * self.first:.1f}", f"{1e6 * self.seconds:.1f}"
        named = (self.workload, self.chip, self.precision)
        return (*named, str(self.calls), first, str(len(self.launches)), own, *times, self.bound)

    def worst(self, count: int) -> list[tuple[int, Launch]]:
        """The longest kinds of launches, all of one kind together: (how many, one of them)."""
        kinds: dict[Launch, int] = {}
        for launch in self.launches:
            kinds[launch] = kinds.get(launch, 0) + 1
        ordered = sorted(kinds, key=lambda one: -kinds[one] * one.seconds)
        return [(kinds[one], one) for one in ordered[:count]]


def _launches(w: Workload, chip: Chip, precision: Precision, folder: Path) -> Iterator[Launch]:
    """All of the meta-step; equal launches are looked at once."""
    seen: dict[str, Launch] = {}
    for kernel in kernels_of(w, precision):
        if not isinstance(kernel, Recorded):
            yield move_of(kernel, chip)
            continue
        key = f"{kernel.key()} {kernel.programs} {kernel.numbers} {kernel.bytes(frozenset(kernel.tensors))}"
        if key not in seen:
            seen[key] = launch_of(kernel, code_of(kernel, chip.capability, folder), chip)
        yield seen[key]


def predicted(w: Workload, chip: str, precision: Precision, folder: Path | None = None) -> Prediction:
    """Compile what is not in the folder (a second a kernel), and predict."""
    own = CHIPS[chip]
    first = predict(w, own.device, precision)
    launches = tuple(_launches(w, own, precision, folder or cache_folder()))
    return Prediction(w.name, chip, precision, len(first.lines), first.seconds, launches)


def _head() -> list[str]:
    return [
        "first: of the schedule's calls; us: of the launches as Triton compiles them; then how much of that is in "
        "launches bound by what",
        f"{'workload':16s} {'chip':8s} {'precision':9s} {'calls':>5s} {'first':>8s} {'launches':>8s} {'us':>8s}  "
        + " ".join(f"{name:>8s}" for name in (*BOUNDS, "mostly")),
    ]


def lines(found: Prediction, worst: int) -> Iterator[str]:
    """A prediction in words, with its worst launches."""
    workload, chip, precision, calls, first, launches, own, *times, bound = found.row()
    split = " ".join(f"{time:>8s}" for time in (*times, bound))
    yield f"{workload:16s} {chip:8s} {precision:9s} {calls:>5s} {first:>8s} {launches:>8s} {own:>8s}  {split}"
    for many, launch in found.worst(worst):
        yield f"  {many:4d} x {launch}"


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_csv(path: Path, found: Sequence[Prediction]) -> None:
    """Rows of COLUMNS."""
    _write(path, COLUMNS, (one.row() for one in found))


def write_launches(folder: Path, found: Prediction) -> Path:
    """Every launch in its order, rows of OF_A_LAUNCH, as ``launches-WORKLOAD-CHIP-PRECISION.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"launches-{found.workload}-{found.chip}-{found.precision}.csv"
    counts = ((f"{one.programs}", f"{one.waves:.3f}", f"{one.issued}", f"{one.fma}") for one in found.launches)
    rows = (
        (one.name, f"{1e6 * one.seconds:.2f}", one.bound, *count, f"{one.moved / 1e6:.6g}")
        for one, count in zip(found.launches, counts, strict=True)
    )
    _write(path, OF_A_LAUNCH, rows)
    return path


class Request(NamedTuple):
    """What a report is to say: of which chips and precisions, how many launches of each, and files, "" for none."""

    chips: Sequence[str]
    precisions: Sequence[Precision]
    worst: int
    out: str = ""
    launches: str = ""


def report(names: Iterable[str], request: Request) -> Iterator[str]:
    """The table, line by line as it is found."""
    every = []
    yield from _head()
    for w in select(names):
        for chip, precision in itertools.product(request.chips, request.precisions):
            every.append(predicted(w, chip, precision))
            yield from lines(every[-1], request.worst)
            if request.launches:
                yield f"wrote {write_launches(Path(request.launches), every[-1])}"
    if request.out:
        write_csv(Path(request.out), every)
        yield f"wrote {request.out}"
