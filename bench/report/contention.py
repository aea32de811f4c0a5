"""Rows of ``python -m bench contention``, and their table in docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bench.report.record import NAN, Record, milliseconds

TABLE = "contention"
FIGURES = ("ms", "mean_ms", "p99_ms")
HEADER = """| workload | busy processes | threads | provider | median | mean | p99 | calls |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Contended(Record):
    """One provider beside ``busy`` processes that spin, with ``threads`` threads. ``ms``: the median of ``n`` calls.

    p99_ms: NaN of fewer than 100 calls. other_load: cores taken by processes that are no part of the measurement.
    """

    busy: int = 0
    mean_ms: float = NAN
    p99_ms: float = NAN


class Rated(NamedTuple):
    """A row and its median, mean and p99 over those of its provider with 1 thread and no busy process."""

    row: Contended
    ratios: tuple[float, ...]


def rated(rows: Iterable[Contended]) -> list[Rated]:
    """Those that were timed; ratios are NaN where the provider was not timed alone with 1 thread."""
    timed = [row for row in rows if row.ok]
    bases = {(row.workload, row.provider): row for row in timed if (row.busy, row.threads) == (0, 1)}
    nothing = Contended("", "", "")
    return [Rated(row, _over(row, bases.get((row.workload, row.provider), nothing))) for row in timed]


def _over(row: Contended, base: Contended) -> tuple[float, ...]:
    return tuple(getattr(row, name) / getattr(base, name) for name in FIGURES)


def _cells(r: Rated) -> list[str]:
    """Milliseconds, and the ratio in brackets; a dash for what is not known."""
    found = []
    for name, ratio in zip(FIGURES, r.ratios, strict=True):
        ms = getattr(r.row, name)
        times = "" if math.isnan(ratio) else f" ({ratio:.2f}x)"
        found.append("-" if math.isnan(ms) else milliseconds(ms) + times)
    return found


def line(r: Rated) -> str:
    """A row in one printed line."""
    median, mean, p99 = _cells(r)
    note = f"  ({r.row.note})" if r.row.note else ""
    return (
        f"{r.row.workload:20s} busy {r.row.busy}  threads {r.row.threads}  {r.row.provider:14s} "
        f"median {median:20s} mean {mean:20s} p99 {p99:20s} n={r.row.n}{note}"
    )


def _cut(row: Contended) -> str:
    """What has to be equal for rows to share a table."""
    return f"{row.machine}, {row.isa}, {row.dtype}"


def table(rows: Iterable[Contended], noise: str) -> str:
    """The Markdown table and the line of its conditions. Raises ValueError for no rows, other rows or a mix."""
    found = rated({(r.workload, r.busy, r.threads, r.provider): r for r in rows}.values())
    if not found:
        raise ValueError("nothing to write: the records hold no timed row")
    if any(math.isnan(r.row.mean_ms) for r in found):
        raise ValueError("the records have no means: expected a CSV written by `python -m bench contention`")
    if len({_cut(r.row) for r in found}) > 1:
        raise ValueError("the records mix machines or dtypes: give a CSV of one setting")
    lines = map(_markdown, found)
    return "\n".join([HEADER, *lines, "", _conditions(found[-1].row, noise)])


def _markdown(r: Rated) -> str:
    cells = [r.row.workload, str(r.row.busy), str(r.row.threads), r.row.provider, *_cells(r), str(r.row.n)]
    return f"| {' | '.join(cells)} |"


def _conditions(row: Contended, noise: str) -> str:
    isa = f", {row.isa}" if row.isa else ""
    version = f"mtml-kernels {row.version}" + (f" ({row.sha})" if row.sha else "")
    return (
        f"Forward and backward of one meta-step, {row.dtype}, calls timed one by one, thread counts and providers in "
        f"turn in one process beside processes that spin, after each provider's gradient matched float64; in brackets "
        f"the ratio to the same provider with 1 thread and no busy process. {row.machine}{isa}; {noise}"
        f"{version}, torch {row.torch}, {row.date[:10]}."
    )
