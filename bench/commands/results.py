"""The options of ``python -m bench results``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.arguments import Commands


def run(args: argparse.Namespace) -> int:
    """Write the page; the exit status."""
    from bench.report import trainings

    print(f"wrote {trainings.write(Path(args.out or trainings.PAGE), Path(args.records or trainings.RECORDS))}")
    return 0


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser("results", help="docs/results.md: recorded trainings beside published figures")
    p.add_argument("--records", help="folder of records (default: bench/results/training)")
    p.add_argument("--out", help="another page than docs/results.md")
    p.set_defaults(call=run)
