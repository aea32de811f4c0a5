"""The options of ``python -m bench triton-report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.arguments import Commands, names


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    from bench.report import triton_report as reporting

    values = reporting.numbers(args.values)
    options = (args.providers, args.timer, args.device, args.metric, args.workload)
    mark = reporting.triton_report(reporting.Request(args.op, args.axis, values, *options))
    if args.save:
        reporting.save(mark, Path(args.save))
        return 0
    for line in reporting.lines(mark):
        print(line, flush=True)
    return 0


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser("triton-report", help="times over a shape axis, as Triton's perf_report makes them")
    p.add_argument("op", help="inner_loop, head_inner_loop, multihead_loss, linear_multihead_loss")
    p.add_argument("--axis", default="", help="steps, tasks, support, query; classes, rows, features")
    p.add_argument("--values", default="", help="on the axis, as 1,5,10")
    p.add_argument("--providers", type=names, default=(), help="the lines, comma-separated")
    p.add_argument("--timer", default="", help="wall (ours), do_bench, cudagraph, proton")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--metric", choices=("ms", "tflops"), default="ms")
    p.add_argument("--workload", default="", help="whose network and other sizes (default: sinusoid, anil_head)")
    p.add_argument("--save", metavar="DIR", help="Triton's plot and CSV go there (needs pandas and matplotlib)")
    p.set_defaults(call=run)
