"""The options of ``python -m bench predict``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from bench.arguments import GPUS, Commands, names, positive

PRECISIONS = ("fp32", "tf32", "3xtf32")


def _some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """``a,b`` -> ("a", "b"), all among the choices."""

    def parse(text: str) -> tuple[str, ...]:
        found = names(text)
        for name in found or ("nothing",):
            if name not in choices:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}; got {name!r}")
        return found

    return parse


def _first(args: argparse.Namespace) -> Iterator[str]:
    """By the schedule."""
    from bench.report import predict as predicting

    for device in args.device:
        for precision in args.precision:
            yield from predicting.report(args.workloads or predicting.DEFAULT, device, precision, args.calls)


def _sass(args: argparse.Namespace) -> Iterator[str]:
    """By compiled kernels."""
    from bench.report import predict as predicting
    from bench.sass import report

    worst = 10**6 if args.calls else args.worst
    request = report.Request(args.device, args.precision, worst, args.out, args.launches)
    yield from report.report(args.workloads or predicting.DEFAULT, request)


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    for name in ("out", "launches"):
        if getattr(args, name) and not args.sass:
            raise ValueError(f"{name}: expected with --sass, whose table it is")
    for line in _sass(args) if args.sass else _first(args):
        print(line, flush=True)
    return 0


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "predict",
        help="calls, FLOPs, bytes and predicted time of a meta-step on a GPU",
        description="By the schedule: its calls, FLOPs and bytes. With --sass by the kernels that Triton makes of it, "
        "compiled for the chip, which need not be there, and counted instruction by instruction: about a second for "
        "each distinct kernel the first time, which are kept under XDG_CACHE_HOME.",
    )
    p.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help="default: the MLPs, siren and the convolutional ones"
    )
    p.add_argument("--device", type=_some_of(GPUS), default=("h200",), help=f"some of {','.join(GPUS)} (default h200)")
    p.add_argument(
        "--precision",
        type=_some_of(PRECISIONS),
        default=("fp32",),
        help=f"of products, some of {','.join(PRECISIONS)} (default fp32)",
    )
    p.add_argument("--calls", action="store_true", help="every call; with --sass every kind of launch")
    p.add_argument("--sass", action="store_true", help="of the compiled launches, beside the first prediction")
    p.add_argument("--worst", type=positive, default=5, help="with --sass: longest launches (default %(default)s)")
    p.add_argument("--out", default="", metavar="CSV", help="with --sass: the table as a file")
    p.add_argument("--launches", default="", metavar="DIR", help="with --sass: files of all launches in order")
    p.set_defaults(call=run)
