"""``python -m bench predict --backend cuda --table``: what `mtml_kernels/cuda/inner_loop/predicted.json` has.

Each kernel runs at two numbers of steps, or of tiles, from which `explain()` reckons the others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mtml_kernels.cuda.inner_loop.predicted as engine
from bench.sass.persistent.meta_steps import POLICY
from bench.sass.persistent.model import summed
from bench.sass.persistent.perceptrons import RanMlp
from bench.sass.persistent.report import Prediction, predicted
from bench.sass.persistent.tiles import RanTiles
from bench.workloads import Workload, select
from mtml_kernels.cuda.inner_loop.predicted import Clocks
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.schedule.devices import DEVICES

__all__ = ["TARGET", "write"]

TARGET = Path(str(engine.__file__)).with_name(engine.TABLE)
FEW, MANY = 25, 4096  # tasks: on chips of 58 multiprocessors and more, fewer and more than they have
STEPS = (1, 5)


class _Case(NamedTuple):
    """A kernel by two meta-steps of which it is one, and where these lie on the line."""

    first: Workload
    last: Workload
    at: tuple[int, int]


def _cases() -> Iterator[_Case]:
    """Of kernels of whole tasks."""
    (sinusoid,) = select(["sinusoid"])
    for workload, tasks in ((sinusoid, FEW), (sinusoid, MANY), (POLICY, FEW), (POLICY, MANY)):
        first, last = (dataclasses.replace(workload, tasks=tasks, steps=steps) for steps in STEPS)
        yield _Case(first, last, STEPS)


def _of_tasks(case: _Case, chip: str) -> Iterator[dict[str, Any]]:
    runs = [predicted(workload, chip).ran for workload in case[:2]]
    clocks = []
    for ran in runs:
        if not isinstance(ran, RanMlp):
            raise BackendUnavailable(f"{case.first.name}: no kernel of a perceptron on {chip}")
        clocks.append(summed(ran.clocks.phases))
    last = runs[1]
    assert isinstance(last, RanMlp)
    samples = [case.last.support, case.last.query]
    yield _row(chip, last.widths, f"{last.rows} rows a warp", last.blocks, samples, case.at, clocks)


def _of_tiles(chip: str) -> Iterator[dict[str, Any]]:
    """The way back by one tile a block and by some, sums of two tiles and of all."""
    (siren,) = select(["siren"])
    small = dataclasses.replace(siren, tasks=1, support=64, query=64)
    found = [predicted(workload, chip) for workload in (small, siren)]
    ways = [{launch.name: launch for launch in _tiled(each).launches} for each in found]
    widths, tile = _tiled(found[0]).widths, _tiled(found[0]).tile
    many = [-(-w.support // tile) for w in (small, siren)]
    for name, last in ways[1].items():
        first = ways[0][name]
        at = (1, 1)
        if name.startswith("sums"):
            at = (many[0], many[1])
        elif name == "tiles back":
            blocks = [w.blocks // tasks for w, tasks in ((first, small.tasks), (last, siren.tasks))]
            at = (-(-many[0] // blocks[0]), -(-many[1] // blocks[1]))
        yield _row(chip, widths, name, last.resident, [0, 0], at, [first.summed(), last.summed()])


def _tiled(found: Prediction) -> RanTiles:
    if not isinstance(found.ran, RanTiles):
        raise BackendUnavailable(f"{found.workload.name}: no kernels of tiles on {found.chip}")
    return found.ran


def _row(
    chip: str, widths: Sequence[int], name: str, resident: int, samples: list[int], at: tuple[int, int],
    clocks: Sequence[Clocks],
) -> dict[str, Any]:  # fmt: skip
    rounded = [
        {**each._asdict(), "units": {unit: round(spent, 1) for unit, spent in sorted(each.units.items())}}
        for each in clocks
    ]
    return {
        "device": DEVICES[chip].name, "widths": list(widths), "name": name, "resident": resident,
        "samples": samples, "at": list(at), "clocks": rounded,
    }  # fmt: skip


def write(chips: Sequence[str], target: Path = TARGET) -> Iterator[str]:
    """Runs every kernel for these chips and writes the file, in which other chips keep their rows; a line for each."""
    names = {DEVICES[chip].name for chip in chips}
    rows = [row for row in json.loads(target.read_text()) if row["device"] not in names] if target.exists() else []
    for chip in chips:
        for case in (*_cases(), None):
            try:
                found = list(_of_tiles(chip) if case is None else _of_tasks(case, chip))
            except BackendUnavailable as why:
                yield f"{chip}: {why}"
                continue
            rows += found
            yield from (f"{chip}: {'-'.join(map(str, row['widths']))}, {row['name']}" for row in found)
        target.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    yield f"wrote {target}"
