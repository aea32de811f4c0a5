"""The options of ``python -m bench task-map``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands, positive


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where gradients differ."""
    import torch

    from bench.measure import task_map

    found = task_map.measure(args.workload, args.threads or torch.get_num_threads(), args.seconds)
    for line in found.lines():
        print(line, flush=True)
    return 0 if found.ok else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "task-map",
        help="a function of one task by every way of mtml.task_map, beside mtml.MAML",
        description="The ways take turns, after their gradients were compared with the loop's.",
    )
    p.add_argument("workload", nargs="?", default="sinusoid", help="default %(default)s")
    p.add_argument("--threads", type=positive, default=0, help="default: torch's own number")
    p.add_argument("--seconds", type=float, default=4.0, help="time budget of each way (default %(default)s)")
    p.set_defaults(call=run)
