"""How long the kernels of perceptrons take on a GPU, predicted: for `explain()`, on GPUs that need not be there.

`predicted.json` has what `python -m bench predict --backend cuda --table` found by running compiled kernels through,
instruction by instruction: clocks of a block, each at two numbers of inner steps (of a kernel that takes whole tasks)
or of tiles (of one that takes or adds up tiles), between and beyond which they are taken to lie on a line.

    time     launch + max(latency, work)
    latency  rounds * the clocks of a block: its phases' chains, and all that a phase does where a block is alone
    work     blocks of a multiprocessor * the clocks of its busiest unit for one block

No GPU has measured any of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from mtml_kernels.cuda.inner_loop.mlp import Bound
from mtml_kernels.schedule.devices import LAUNCH_SECONDS, Device

__all__ = [
    "ENDS_SECONDS", "GAP_SECONDS", "SECTOR_BYTES", "SUM_THREADS", "TABLE", "Clocks", "Prediction", "Row", "Time",
    "prediction", "rows", "sum_blocks", "time_of", "time_of_tiles",
]  # fmt: skip

GAP_SECONDS = LAUNCH_SECONDS  # from a launch's end to the next one's work
ENDS_SECONDS = GAP_SECONDS + 2.5e-6  # [A] of a launch by itself: the second part is of its ends
SUM_THREADS = 64  # of a block that adds up what tiles leave
SECTOR_BYTES = 32  # of which global memory moves all or none
TABLE = "predicted.json"


class Clocks(NamedTuple):
    """Of a block: where it is alone on a multiprocessor, by its chains, and of each unit. copied: bytes onto the chip;
    sectors: of global memory that it writes, or reads into registers.
    """

    alone: float
    chain: float
    units: dict[str, float]
    copied: float = 0.0
    sectors: float = 0.0


class Time(NamedTuple):
    """Clocks of the two bounds, the unit that `work` is of, and seconds."""

    latency: float
    work: float
    unit: str
    blocks: int  # on a multiprocessor
    seconds: float

    @property
    def bound(self) -> str:
        """What takes the longest."""
        return "latency" if self.latency >= self.work else self.unit


class Row(NamedTuple):
    """A kernel on a GPU: its clocks at two places `at` of steps or tiles.

    name: of a kernel of whole tasks the rows of a warp, of others the kind of launch. resident: blocks that a
    multiprocessor holds. support, query: samples, of a kernel of whole tasks.
    """

    device: str
    widths: tuple[int, ...]
    name: str
    resident: int
    support: int
    query: int
    at: tuple[int, int]
    clocks: tuple[Clocks, Clocks]

    def between(self, x: int) -> Clocks:
        """At a number of steps or of tiles."""
        (first, last), (a, b) = self.at, self.clocks

        def line(low: float, high: float) -> float:
            return low if first == last else low + (high - low) * (x - first) / (last - first)

        units = {name: line(a.units.get(name, 0.0), b.units.get(name, 0.0)) for name in {**a.units, **b.units}}
        rest = (line(low, high) for low, high in ((a.copied, b.copied), (a.sectors, b.sectors)))
        return Clocks(line(a.alone, b.alone), line(a.chain, b.chain), units, *rest)


def time_of(clocks: Clocks, device: Device, blocks: int, resident: int) -> Time:
    """Of a launch of so many blocks, or of tasks that blocks take in turn, where `resident` fit a multiprocessor."""
    own = -(-blocks // device.processors)
    held = max(1, min(resident, own))
    rounds = -(-own // held)
    busy, unit = max((of_unit, name) for name, of_unit in clocks.units.items())
    latency, work = rounds * (clocks.alone if held == 1 else clocks.chain), own * busy
    return Time(latency, work, unit, held, ENDS_SECONDS + max(latency, work) / device.hertz)


def time_of_tiles(clocks: Clocks, device: Device, blocks: int, resident: int) -> Time:
    """Of a launch of blocks of tiles, without what lies between two: what they copy, then the longest of three."""
    found = time_of(clocks, device, blocks, resident)
    own = -(-blocks // device.processors)
    share = device.l2_bandwidth / device.processors / device.hertz  # bytes a clock
    moved = own * SECTOR_BYTES * clocks.sectors / share
    every = {"latency": found.latency, found.unit: found.work, "second-level cache": moved}
    unit = max(every, key=lambda name: every[name])
    all_clocks = own * clocks.copied / share + every[unit]
    return found._replace(latency=0.0, work=all_clocks, unit=unit, seconds=all_clocks / device.hertz)


class Prediction(NamedTuple):
    """Of a call: seconds, and what they are bound by; samples: of a row with more than the call has, else None."""

    seconds: float
    bound: str
    samples: tuple[int, int] | None = None

    def __str__(self) -> str:
        said = f"predicted {1e6 * self.seconds:.1f} us, bound by {self.bound}"
        if self.samples is not None:
            said += f" (of {self.samples[0]} and {self.samples[1]} samples, so at most)"
        return said


@functools.cache
def rows() -> tuple[Row, ...]:
    """Those of the table."""
    found = json.loads(resources.files(__package__).joinpath(TABLE).read_text())
    return tuple(map(_row, found))


def _row(row: Mapping[str, Any]) -> Row:
    first, last = (Clocks(**each) for each in row["clocks"])
    (support, query), (start, end) = row["samples"], row["at"]
    return Row(
        row["device"], tuple(row["widths"]), row["name"], row["resident"], support, query, (start, end), (first, last)
    )


def prediction(bound: Bound, device: Device, known: tuple[Row, ...] | None = None) -> Prediction | str:
    """Of a call by the kernels of a perceptron; or why there is none, in words.

    Args:
        bound: the kernels and how they are launched.
        device: one of `DEVICES`, for which the call was bound.
        known: rows, those of the table by default.
    """
    call, widths = bound.call, bound.form.widths
    if bound.terms:
        return "the clocks of products on matrix units are not known"
    if bound.form.bent:
        return "the clocks of an activation that bends are not known"
    if not call.wants_gradient or call.first_order or call.wants_rates or not call.steps:
        return "clocks are known of steps of exact second order without gradients of rates alone"
    every = [row for row in (rows() if known is None else known) if (row.device, row.widths) == (device.name, widths)]
    return _of_tiles(bound, device, every) if bound.tile else _of_tasks(bound, device, every)


def _of_tasks(bound: Bound, device: Device, every: list[Row]) -> Prediction | str:
    call = bound.call
    name, own = f"{bound.launch.rows} rows a warp", (call.support, call.query)
    fitting = [row for row in every if row.name == name and own[0] <= row.support and own[1] <= row.query]
    if not fitting:
        return f"no clocks are known of so many samples on {device.name}"
    row = min(fitting, key=lambda row: (row.support, row.query))
    time = time_of(row.between(call.steps), device, call.tasks, row.resident)
    return Prediction(time.seconds, time.bound, None if own == (row.support, row.query) else (row.support, row.query))


def _of_tiles(bound: Bound, device: Device, every: list[Row]) -> Prediction | str:
    """The kinds of launches are those of bench/sass/persistent/perceptrons.py."""
    call, by_name = bound.call, {row.name: row for row in every}
    if not by_name:
        return f"no clocks are known on {device.name}"
    support, query = (-(-samples // bound.tile) for samples in (call.support, call.query))
    back = bound.launch.blocks // call.tasks
    kinds = [  # name, how often, tiles of a block, blocks of a task
        ("tiles there, from the caller's parameters", 1, 1, support),
        ("tiles there", call.steps - 1, 1, support),
        ("sums there", call.steps, support, 0),
        ("tiles of the query set", 1, 1, query),
        ("sums of the query set", 1, query, 0),
        ("tiles back", call.steps, -(-support // back), back),
        ("sums back", call.steps, support, 0),
    ]
    sums, spent = sum_blocks(bound.form.widths), list[tuple[float, str]]()
    for name, times, tiles, blocks in kinds:
        row = by_name[name]
        time = time_of_tiles(row.between(tiles), device, call.tasks * (blocks or sums), row.resident)
        spent.append((times * time.seconds, time.unit))
    gaps = sum(times for _, times, *_ in kinds) * GAP_SECONDS
    seconds = sum(each for each, _ in spent) + gaps + ENDS_SECONDS - GAP_SECONDS
    return Prediction(seconds, max(spent)[1])


def sum_blocks(widths: tuple[int, ...]) -> int:
    """Of a task, as csrc/cuda/inner_loop/mlp/tile_sums.cuh has it: a thread four parameters, and one block more."""
    rows = [i if i < 4 else 4 * (-(-i // 4) | 1) for i in widths]
    whole = sum(-(-o * rows[at] // 4) + -(-o // 4) for at, o in enumerate(widths[1:]))
    return -(-whole // SUM_THREADS) + 1
