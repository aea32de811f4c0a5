"""The options of ``python -m bench gpu``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from bench.arguments import GPUS, Commands, names


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    from bench.gpu import plan

    if args.dry_run:
        for line in plan.describe(args.workloads, args.device):
            print(line)
        return 0
    if args.out is None:
        raise ValueError("out: expected a folder for the results (--out DIR), got none; --dry-run needs none")
    if args.step:
        from bench.gpu import step

        chosen = plan.step_named(args.step)
        providers = tuple(p for p in chosen.providers if p not in args.without)
        return step.main(replace(chosen, providers=providers), Path(args.out))
    from bench.gpu import command

    return command.run(Path(args.out), args.minutes, args.workloads)


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "gpu",
        help="on a GPU machine: build, test, then time everything beside its prediction",
        description="Builds the package where it is not built, runs the tests marked gpu, and where they pass times "
        "every workload beside its peers and its prediction, the most important first. Needs no network. Rows go to "
        "DIR/results.csv as they come. Exit status 1 where a test failed (nothing is timed then) or a row of ours is "
        "wrong, 2 without a GPU.",
    )
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all that --dry-run lists")
    p.add_argument("--out", metavar="DIR", help="folder for results.csv, kernels-*.csv, gate.txt and plots")
    p.add_argument("--minutes", type=float, default=6.0, help="for all of it, build included (default %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="print what would be measured, with predictions")
    p.add_argument("--device", choices=GPUS, default="h200", help="whose numbers --dry-run takes (default %(default)s)")
    p.add_argument("--step", help=argparse.SUPPRESS)  # one step in this process: how the command calls itself
    p.add_argument("--without", type=names, default=(), help=argparse.SUPPRESS)
    p.set_defaults(call=run)
