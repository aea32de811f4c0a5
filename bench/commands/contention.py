"""The options of ``python -m bench contention``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, names, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where this project's own provider failed or did not match."""
    from bench import providers
    from bench.measure import contention
    from bench.report import record

    chosen = args.providers or contention.PROVIDERS
    options = contention.Options(args.busy, args.threads, chosen, args.seconds)
    rows = contention.run(args.workloads, options, lambda line: print(line, flush=True))
    if args.out:
        record.write_csv(args.out, rows)
        print(f"wrote {args.out}")
    wrong = [r for r in rows if providers.is_ours(r.provider) and r.status in ("mismatch", "failed")]
    return 1 if wrong else 0


def _numbers(text: str) -> tuple[int, ...]:
    """``0,1,2`` -> (0, 1, 2)."""
    return tuple(map(positive, names(text)))


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "contention",
        help="meta-steps beside processes that keep cores busy, at several numbers of threads",
        description="Providers that pass the gate of `run` are timed call by call, numbers of threads and providers in "
        "turn, beside each number of busy processes: median, mean, p99, and their ratios to 1 thread and no busy one. "
        "`readme CSV --table contention` writes the table. Exit status as that of `run`.",
    )
    p.add_argument("workloads", nargs="+", metavar="WORKLOAD")
    p.add_argument("--busy", type=_numbers, default=(0, 1, 2), help="numbers of busy processes (default 0,1,2)")
    p.add_argument("--threads", type=_numbers, default=(1, 2), help="numbers of torch's threads (default 1,2)")
    p.add_argument("--providers", type=names, default=(), help="default: mtml,loop")
    p.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="for each row; longer where 200 calls take longer, up to four times (default %(default)s)",
    )
    p.add_argument("--out", help="CSV file for the records")
    p.set_defaults(call=run)
