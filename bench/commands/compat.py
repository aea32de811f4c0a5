"""The options of ``python -m bench compat``."""

from __future__ import annotations

import argparse

from bench.arguments import Commands


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status: 1 where gradients differ."""
    from bench import compat

    ok = True
    for library in args.library or compat.libraries():
        found = compat.measure(library, args.original, args.seconds, args.steps)
        for line in found.lines():
            print(line, flush=True)
        ok = ok and found.ok
    return 0 if ok else 1


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "compat",
        help="a script's loop over tasks on mtml.compat beside the original library, and the batched engine",
        description="The meta-step of a script for another library, sinusoids of 25 tasks, on the original, on "
        "mtml.compat and by its one line for the batched engine, in turn on one thread, in that thread's own time. "
        "Gradients are compared first. Without the original only ours are timed.",
    )
    p.add_argument("library", nargs="*", help="default: every one that has a provider, bench/compat_<library>.py")
    p.add_argument("--original", metavar="PATH", help="the original's source tree; default: as installed, if it is")
    p.add_argument("--steps", type=int, default=5, help="inner steps (default %(default)s)")
    p.add_argument("--seconds", type=float, default=8.0, help="time budget of each (default %(default)s)")
    p.set_defaults(call=run)
