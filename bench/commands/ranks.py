"""The options of ``python -m bench ranks``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where gradients differ."""
    from bench.measure import ranks

    found = ranks.measure(args.workload, args.ranks, args.threads, args.seconds)
    for line in found.lines():
        print(line, flush=True)
    return 0 if found.ok else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "ranks",
        help="throughput of several ranks (processes) beside one, with as many threads each",
        description="One rank with all tasks and several with their shares train in turn on this machine, by gloo. "
        "Their gradients are compared first.",
    )
    p.add_argument("workload", nargs="?", default="omniglot_conv", help="default %(default)s")
    p.add_argument("--ranks", type=positive, default=2, help="default %(default)s")
    p.add_argument("--threads", type=positive, default=1, help="of each rank (default %(default)s)")
    p.add_argument("--seconds", type=float, default=10.0, help="time budget of each way (default %(default)s)")
    p.set_defaults(call=run)
