"""``python -m bench compare BASE HEAD``: two recorded runs, a verdict per row, and whether anything regressed.

A row's figure is its ratio: the time of the fastest peer that both runs have, over its own time. Both times come from
the same run, so a machine that drifted between the two runs does not decide. Where no common peer exists, or with
``metric="ms"``, it is the time itself.

Each figure has a range: what it is where each of its times lies half an interquartile range above or below its median.
A change beyond the tolerance whose two ranges overlap is "ambiguous", and no regression: measure longer, or alone. Runs
from before the ranges were recorded are judged by their medians.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.providers.base import is_ours
from bench.report.record import Record

Metric = Literal["auto", "ms"]
Key = tuple[str, str, str, str, int]


@dataclass(frozen=True)
class Verdict:
    """One compared row. ``change``: how much faster head is than base (1.1: ten per cent faster).

    ``verdict``: faster, same, slower or ambiguous; or why head has no time: gone, mismatch, failed.
    """

    key: Key
    figure: str
    base: float
    head: float
    change: float
    verdict: str
    note: str = ""

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "gone", "mismatch", "failed")


class Figure(NamedTuple):
    """A time or a ratio, and the range it is known to; NaN where no spread was recorded."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Figure) -> bool:
        """Whether the ranges meet; False where one of them is not known."""
        return self.low <= other.high and other.low <= self.high


def _time(r: Record) -> Figure:
    return Figure(r.ms, max(r.ms - r.iqr_ms / 2, r.best_ms), r.ms + r.iqr_ms / 2)


def _ratio(peer: Record, own: Record) -> Figure:
    over, under = _time(peer), _time(own)
    return Figure(over.value / under.value, over.low / under.high, over.high / under.low)


def _ranges(before: Figure, after: Figure, verdict: str) -> str:
    if verdict != "ambiguous":
        return ""
    return f"{before.low:.4g} .. {before.high:.4g} and {after.low:.4g} .. {after.high:.4g} overlap"


def _latest(records: Iterable[Record]) -> dict[Key, Record]:
    """The last record of each key: an appended file holds several runs."""
    return {r.key: r for r in records}


def _common_peer(key: Key, base: dict[Key, Record], head: dict[Key, Record]) -> Key | None:
    """The peer of this workload that both runs timed and that was fastest in base."""

    def comparable(k: Key) -> bool:
        return k[0] == key[0] and k[2:] == key[2:] and not is_ours(k[1]) and base[k].ok and k in head and head[k].ok

    return min(filter(comparable, base), key=lambda k: base[k].ms, default=None)


def _judge(key: Key, base: dict[Key, Record], head: dict[Key, Record], tolerance: float, metric: Metric) -> Verdict:
    old, new = base[key], head.get(key)
    if new is None or not new.ok:
        verdict = "gone" if new is None or new.status == "skipped" else new.status
        return Verdict(key, "ms", old.ms, float("nan"), float("nan"), verdict, new.note if new else "not in head")
    peer = _common_peer(key, base, head) if metric == "auto" and is_ours(key[1]) else None
    timed = [old, new] if peer is None else [old, new, base[peer], head[peer]]
    if not all(0 < r.ms < math.inf for r in timed):
        note = f"expected times, got {', '.join(f'{r.ms:g} ms' for r in timed)}: measure again"
        return Verdict(key, "ms", old.ms, new.ms, float("nan"), "failed", note)
    if peer is None:
        before, after = _time(old), _time(new)
        change = before.value / after.value
    else:
        before, after = _ratio(base[peer], old), _ratio(head[peer], new)
        change = after.value / before.value
    verdict = "slower" if change < 1 / (1 + tolerance) else "faster" if change > 1 + tolerance else "same"
    if verdict != "same" and before.overlaps(after):
        verdict = "ambiguous"
    figure = "ms" if peer is None else f"x {peer[1]}"
    return Verdict(key, figure, before.value, after.value, change, verdict, _ranges(before, after, verdict))


def compare(
    base: Iterable[Record],
    head: Iterable[Record],
    tolerance: float = 0.05,
    metric: Metric = "auto",
    peers: bool = False,
) -> list[Verdict]:
    """Judge every row of base that was timed: ours only, or with ``peers`` all providers.

    A row that head does not have, or that no longer matches, counts as a regression.
    """
    old, new = _latest(base), _latest(head)
    return [_judge(key, old, new, tolerance, metric) for key in old if old[key].ok and (peers or is_ours(key[1]))]


def line(v: Verdict) -> str:
    """A verdict in one printed line."""
    name = f"{v.key[0]:20s} {v.key[1]:14s} {v.key[4]} threads"
    return f"{name}  {v.base:9.3f} -> {v.head:9.3f} {v.figure:10s} {v.change:6.3f}  {v.verdict}" + (
        f" ({v.note})" if v.note else ""
    )
