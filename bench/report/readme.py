"""``python -m bench readme CSV``: a documented speed table, written between its two markers from recorded results.

README's has no name; those of docs/benchmarks.md, of other machines, have: ``<!-- bench:NAME:start -->``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from bench.measure import load
from bench.providers.base import OWN
from bench.report import contention
from bench.report.record import Record, fastest_peer, milliseconds, read_rows
from bench.workloads import WORKLOADS
from bench.workloads.heads import WORKLOADS as HEADS
from bench.workloads.inner import WORKLOADS as INNER

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

NETWORKS = {w.name: w.network for w in (*WORKLOADS.values(), *INNER.values())}

HEADER = """| workload | network | plain loop | fastest peer | mtml | speed-up | share of peak |
|---|---|---|---|---|---|---|"""

HEADS_HEADER = """| workload | what | eager | torch.compile | mtml | speed-up over the faster |
|---|---|---|---|---|---|"""


def _ms(record: Record | None) -> str:
    if not record or not record.ok:
        return "-"
    return milliseconds(record.ms) + ("" if math.isnan(record.iqr_ms) else f" (IQR {record.iqr_ms:.2g})")


def _row(workload: str, rows: list[Record]) -> str:
    by_name = {r.provider: r for r in rows if r.workload == workload}
    ours, peer = by_name.get(OWN), fastest_peer(rows, workload)
    network = NETWORKS.get(workload, "")
    loops = [r for r in rows if r.workload == workload and r.ok and r.provider.partition(":")[0] == "loop"]
    loop = by_name.get("loop", min(loops, key=lambda r: r.ms, default=None))
    fastest = f"{_ms(peer)} ({peer.provider})" if peer else "-"
    speedup = f"**{peer.ms / ours.ms:.1f}x**" if ours and ours.ok and peer else "-"
    share = f"{ours.share_of_peak:.0%}" if ours and ours.ok else "-"
    return f"| {workload} | {network} | {_ms(loop)} | {fastest} | {_ms(ours)} | {speedup} | {share} |"


def _heads_row(workload: str, rows: list[Record]) -> str:
    by_name = {r.provider: r for r in rows if r.workload == workload}
    ours, peer = by_name.get(OWN), fastest_peer(rows, workload)
    speedup = f"**{peer.ms / ours.ms:.1f}x**" if ours and ours.ok and peer else "-"
    what = HEADS[workload].what
    peers = f"{_ms(by_name.get('eager'))} | {_ms(by_name.get('compile'))}"
    return f"| {workload} | {what} | {peers} | {_ms(ours)} | {speedup} |"


def unquiet(rows: Iterable[Record]) -> str:
    """What other processes took at most while rows were timed, where that is too much to say nothing."""
    most = max((r.other_load for r in rows if not math.isnan(r.other_load)), default=0.0)
    return f"not a quiet machine: other processes took up to {most:.2f} of a core; " if most > load.QUIET else ""


def _conditions(row: Record, noise: str) -> str:
    isa = f", {row.isa}" if row.isa else ""
    threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
    heads = row.workload in HEADS
    what = "Forward and backward" if heads else "One meta-step (loss and exact second-order gradient)"
    if row.workload in INNER:
        what = "One call of the inner loops, with the exact gradient where there is one"
    result = "result" if row.workload in INNER else "gradient"
    version = f"mtml-kernels {row.version}" + (f" ({row.sha})" if row.sha else "")
    return (
        f"{what}, {row.dtype}, medians, all providers interleaved in "
        f"one process after each one's {result} matched float64. {threads} of {row.machine}{isa}; "
        f"peak {row.peak_gflops:.0f} GFLOP/s ({row.peak_source}, measured in the same run); {noise}"
        f"{version}, torch {row.torch}, {row.date[:10]}."
    )


def table(records: Iterable[Record]) -> str:
    """The Markdown table and the line of its conditions. Raises ValueError where this project has no timed row."""
    rows = list({r.key: r for r in records if r.workload != "tiny"}.values())
    ours = [r for r in rows if r.provider == OWN and r.ok]
    if not ours:
        raise ValueError(f"nothing to write: the records hold no timed row of provider {OWN}")
    if len({(r.threads, r.machine, r.dtype) for r in ours}) > 1:
        raise ValueError("the records mix machines, threads or dtypes: give a CSV of one setting")
    names = dict.fromkeys(r.workload for r in ours)
    if len({name in HEADS for name in names}) > 1:
        raise ValueError("the records mix inner loops and multi-head losses: give a CSV of one kind")
    heads = ours[0].workload in HEADS
    lines = [_heads_row(w, rows) if heads else _row(w, rows) for w in names]
    return "\n".join([HEADS_HEADER if heads else HEADER, *lines, "", _conditions(ours[-1], unquiet(rows))])


def markers(name: str = "") -> tuple[str, str]:
    """Where the table of this name begins and ends."""
    label = f"bench:{name}:" if name else "bench:"
    return f"<!-- {label}start -->", f"<!-- {label}end -->"


def document(name: str = "") -> Path:
    """The document with the table of this name. Raises ValueError where there is none."""
    first = markers(name)[0]
    for path in DOCUMENTS:
        if first in path.read_text():
            return path
    raise ValueError(
        f"--table {name}: expected {first} in README.md or docs/benchmarks.md; --readme names another document"
    )


def read(csv: str | os.PathLike[str], name: str = "") -> list[Record]:
    """The records of the table of this name. Raises ValueError where a file is not of its kind."""
    return [*read_rows(csv, contention.Contended if name == contention.TABLE else Record)]


def _rendered(records: Iterable[Record], name: str) -> str:
    if name != contention.TABLE:
        return table(records)
    rows = [r for r in records if isinstance(r, contention.Contended)]
    return contention.table(rows, unquiet(rows))


def write(path: str | os.PathLike[str], records: Iterable[Record], name: str = "") -> None:
    """Replace what stands between the markers of a document. Raises ValueError where a marker is missing."""
    target = Path(path)
    first, last = markers(name)
    text = target.read_text()
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise ValueError(f"{path}: expected the markers {first} and {last}, each on a line of its own")
    target.write_text(f"{before}{first}\n{_rendered(records, name)}\n{last}{after}")
