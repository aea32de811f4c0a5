"""The options of ``python -m bench multitask``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where gradients differ."""
    import torch

    from bench.measure import multitask

    found = multitask.measure(args.tasks, args.threads or torch.get_num_threads(), args.seconds)
    for line in found.lines():
        print(line, flush=True)
    return 0 if found.ok else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "multitask",
        help="a meta-step of mtml.MultiTaskMAML beside a loop over tasks and torch.func",
        description="Four kinds of tasks; the ways take turns, after their gradients were compared with the loop's.",
    )
    p.add_argument("--tasks", type=positive, default=16, help="of every kind (default %(default)s)")
    p.add_argument("--threads", type=positive, default=0, help="default: torch's own number")
    p.add_argument("--seconds", type=float, default=4.0, help="time budget of each way (default %(default)s)")
    p.set_defaults(call=run)
