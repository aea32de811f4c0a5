"""The options of ``python -m bench export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.arguments import Commands


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    out = Path(args.out)
    if args.format == "hf-kernels":
        if args.workloads:
            raise ValueError(f"workload: hf-kernels takes the scripts of benchmarks/ as they are; got {args.workloads}")
        from bench.export import hf_kernels

        written = hf_kernels.write(out)
    else:
        from bench.export import flashinfer_trace

        written = flashinfer_trace.write(out, flashinfer_trace.chosen(args.workloads))
    for path in written:
        print(f"wrote {path}", flush=True)
    return 0


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser("export", help="the workloads in the formats of other projects' benchmarks")
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: the usual meta-steps and losses")
    p.add_argument(
        "--format",
        choices=("flashinfer-trace", "hf-kernels"),
        required=True,
        help="a data set for flashinfer-bench; a folder for Hugging Face's `kernels benchmark`",
    )
    p.add_argument("--out", required=True, metavar="DIR")
    p.set_defaults(call=run)
