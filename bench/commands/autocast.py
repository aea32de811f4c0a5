"""The options of ``python -m bench autocast``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where a gradient under autocast is worse than twice the plain loop's."""
    from bench.measure import autocast

    found = autocast.measure(tuple(args.workloads or ("sinusoid", "omniglot_mlp")), args.threads, args.seconds)
    return 0 if all(compared.ok for compared in found) else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "autocast",
        help="fused meta-steps under autocast and in bfloat16, beside float32 and the plain loop under autocast",
        description="Gradients are compared with float64 first, then all are timed in turn. Exit status 1 where the "
        "error under autocast is above twice the plain loop's.",
    )
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: sinusoid omniglot_mlp")
    p.add_argument("--threads", type=positive, default=0, help="default: torch's own number")
    p.add_argument("--seconds", type=float, default=4.0, help="time budget of each way (default %(default)s)")
    p.set_defaults(call=run)
