"""``python -m bench run``: gate every provider, time those that match, in turn, and record."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import providers, workloads
from bench.measure import flops, load, peak, timing
from bench.measure.match import Gate, Match
from bench.providers import Prepared, Unavailable, is_ours
from bench.providers import inner as inner_providers
from bench.providers.base import Result
from bench.report.record import Record, environment, fastest_peer
from bench.workloads import heads, inner

AnyWorkload = workloads.Workload | heads.HeadsWorkload
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What ``run`` was asked for. No providers: all there are."""

    providers: tuple[str, ...] = ()
    seconds: float = 8.0
    threads: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def names() -> list[str]:
    """Every workload there is."""
    return [*workloads.WORKLOADS, *inner.WORKLOADS, *heads.WORKLOADS]


def find(name: str) -> AnyWorkload:
    """The workload of this name; raises ValueError naming the choices."""
    if name in heads.WORKLOADS:
        return heads.WORKLOADS[name]
    if name in inner.WORKLOADS:
        return inner.WORKLOADS[name]
    return workloads.select([name])[0]


def prepare(w: AnyWorkload, provider: str, dtype: torch.dtype, device: str, seed: int = 0) -> Prepared:
    """Bind a provider to the network and data of a seed."""
    if isinstance(w, heads.HeadsWorkload):
        return heads.prepare(w, provider, dtype, device, seed)
    if isinstance(w, inner.InnerWorkload):
        return inner_providers.prepare(w, provider, dtype, device, seed)
    bind = providers.load(provider)
    return bind(w, workloads.make_network(w, dtype, device, seed), workloads.make_data(w, dtype, device, seed))


def outcome(prepared: Prepared) -> Result:
    """One call's loss and gradients, as tensors of their own."""
    loss, grads = prepared.result(prepared.run())
    return loss.detach().clone(), [g.detach().clone() for g in grads]


def gate_for(w: AnyWorkload, options: Options) -> Gate:
    """The match gate of a workload: the plain loop (eager, for heads) on the same inputs, where it is not another."""
    reference = (
        "eager" if isinstance(w, heads.HeadsWorkload) else w.oracle if isinstance(w, inner.InnerWorkload) else "loop"
    )
    return Gate(lambda dtype, seed: outcome(prepare(w, reference, dtype, options.device, seed)), options.dtype)


def _counts(w: AnyWorkload, itemsize: int) -> tuple[int, int]:
    if isinstance(w, heads.HeadsWorkload):
        return w.flops, w.bytes(itemsize)
    if isinstance(w, inner.InnerWorkload):
        return flops.inner_loop(w), flops.inner_loop_bytes(w, itemsize)
    return flops.meta_step(w), flops.meta_step_bytes(w, itemsize)


def _first_call(w: AnyWorkload, name: str, options: Options, seed: int) -> tuple[Prepared, Result, float, str]:
    """Prepare and call once; our own warnings (a fallback to a slower path) are kept as a note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        prepared = prepare(w, name, options.dtype, options.device, seed)
        result = outcome(prepared)
        seconds = time.perf_counter() - start
    notes = [str(c.message).splitlines()[0] for c in caught if c.category.__name__ == "FallbackWarning"]
    return prepared, result, seconds, "; ".join(notes)


def admit(w: AnyWorkload, name: str, options: Options, gate: Gate) -> tuple[Prepared | None, Record]:
    """Run a provider once and judge it: (None, record) where it cannot run or does not match."""
    record = Record(w.name, name, "ok", dtype=str(options.dtype).removeprefix("torch."))
    try:
        prepared, result, seconds, note = _first_call(w, name, options, gate.seed)
        match = gate.check(result, lambda seed: outcome(prepare(w, name, options.dtype, options.device, seed)))
    except Unavailable as error:
        return None, replace(record, status="skipped", note=str(error))
    except Exception as error:  # a provider that cannot run is reported, never hidden
        return None, replace(record, status="failed", note=f"{type(error).__name__}: {str(error).strip()[:200]}")
    record = replace(record, first_s=seconds, match_error=match.error, match_score=match.score, note=note)
    if not match.ok:
        return None, replace(record, status="mismatch", note=_mismatch(match))
    return prepared, record


def _mismatch(match: Match) -> str:
    return (
        f"error {match.error:.1e} against float64, {match.score:.1f} times the tolerance "
        f"(median of {match.seeds} seeds): not timed"
    )


def _complete(record: Record, t: timing.Timing, best: peak.Peak, work: tuple[int, int]) -> Record:
    gflop, seconds = work[0] / 1e9, t.ms / 1e3
    return replace(
        record,
        ms=t.ms,
        best_ms=t.best_ms,
        iqr_ms=t.iqr_ms,
        n=t.n,
        gflop=gflop,
        gflops=gflop / seconds,
        share_of_peak=gflop / seconds / best.gflops,
        gbs=work[1] / 1e9 / seconds,
        peak_gflops=best.gflops,
        peak_source=best.source,
    )


def _asked(w: AnyWorkload, options: Options) -> tuple[str, ...]:
    """The providers to run: those asked for that know this kind of workload, or all of its kind."""
    if isinstance(w, heads.HeadsWorkload):
        return tuple(p for p in options.providers if p in heads.PROVIDERS) or heads.PROVIDERS
    default = w.providers if isinstance(w, inner.InnerWorkload) else providers.default(w)
    return tuple(p for p in options.providers if p != "eager") or default


def run_workload(w: AnyWorkload, options: Options, say: Say = print) -> list[Record]:
    """Gate and time the providers of one workload; their records in the order asked for."""
    gate, admitted, records = gate_for(w, options), dict[str, Prepared](), list[Record]()
    for name in _asked(w, options):
        prepared, record = admit(w, name, options, gate)
        records.append(record)
        if prepared is None:
            say(f"{w.name:20s} {name:14s} {record.status}: {record.note}")
        else:
            admitted[name] = prepared
    before = peak.measure(options.dtype, options.threads, options.device)
    watch = load.Watch()
    times = timing.interleave({n: p.run for n, p in admitted.items()}, options.seconds, options.device)
    others = watch.cores()
    for text in load.warning(w.name, others):
        say(text)
    best = peak.higher(before, peak.measure(options.dtype, options.threads, options.device))
    work, where = _counts(w, options.dtype.itemsize), environment(options.device)
    records = [_complete(r, times[r.provider], best, work) if r.provider in times else r for r in records]
    return [replace(r, other_load=others, **where) for r in records]


def line(r: Record) -> str:
    """A timed record in one printed line: the median, how far its middle half spreads, the best."""
    note = f"  ({r.note})" if r.note else ""
    share = f"{r.share_of_peak:5.1%} of {r.peak_gflops:.0f} {r.peak_source}"
    return (
        f"{r.workload:20s} {r.provider:14s} {r.ms:10.3f} ms (IQR {r.iqr_ms:8.3f})  "
        f"best {r.best_ms:10.3f}  n={r.n:<4d} match {r.match_error:.1e}  "
        f"{r.gflops:7.1f} GFLOP/s ({share})  first {r.first_s:.2f} s{note}"
    )


def ratios(records: Iterable[Record]) -> list[str]:
    """For each of our timed records: how many times faster than the fastest peer of the same run."""
    rows, lines = list(records), []
    for ours in rows:
        peer = fastest_peer(rows, ours.workload)
        if ours.ok and is_ours(ours.provider) and peer:
            lines.append(
                f"{ours.workload}: {ours.provider} is {peer.ms / ours.ms:.2f} x the fastest peer ({peer.provider})"
            )
    return lines


def check_providers(specs: Iterable[str]) -> None:
    """Raises ValueError for a provider or option that does not exist; one that is not installed is told of later."""
    for spec in specs:
        with contextlib.suppress(Unavailable):
            providers.load(spec)


def run(chosen: Iterable[str], options: Options, say: Say = print) -> list[Record]:
    """Run several workloads. Raises ValueError for an unknown workload or provider before anything is measured."""
    selected: list[Any] = [find(name) for name in chosen]
    check_providers(p for p in options.providers if p not in heads.PROVIDERS)
    options = replace(options, threads=options.threads or torch.get_num_threads())
    torch.set_num_threads(options.threads)
    records: list[Record] = []
    for w in selected:
        rows = run_workload(w, options, say)
        for r in sorted((r for r in rows if r.ok), key=lambda r: r.ms):
            say(line(r))
        for text in ratios(rows):
            say(text)
        records += rows
    return records
