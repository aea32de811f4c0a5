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


def _numbers(text: str) -> tuple[int, ...]:
    """``1,5`` -> (1, 5)"""
    return tuple(map(positive, names(text)))


def _first(args: argparse.Namespace) -> Iterator[str]:
    """By the schedule."""
    from bench.report import predict as predicting

    for device in args.device:
        for precision in args.precision:
            yield from predicting.report(args.workloads or predicting.DEFAULT, device, precision, args.calls)


def _sass(args: argparse.Namespace) -> Iterator[str]:
    """By compiled kernels; those of heads by programs that run."""
    from bench.report import predict as predicting
    from bench.sass import report
    from bench.sass.heads import report as heads

    of_heads = [name in (heads.GROUP, *heads.NAMES) for name in args.workloads]
    if any(of_heads):
        if not all(of_heads) or args.precision != ("fp32",) or args.launches:
            raise ValueError(
                f"workloads: expected {heads.GROUP}, or some of {', '.join(heads.NAMES)}, in a call of their own, "
                f"in fp32 and without --launches; got {', '.join(args.workloads)}"
            )
        yield from heads.report(args.workloads, args.device, 10**6 if args.calls else args.worst, args.out)
        return

    worst = 10**6 if args.calls else args.worst
    request = report.Request(args.device, args.precision, worst, args.out, args.launches)
    yield from report.report(args.workloads or predicting.DEFAULT, request)


def _persistent(args: argparse.Namespace) -> Iterator[str]:
    """By the persistent kernel."""
    from bench.sass.persistent import report, table

    if args.table:
        yield from table.write(args.device)
        return
    form = f"cuda:{args.form}" if args.form else "cuda"
    request = report.Request(args.device, args.tasks, args.steps, args.worst, args.out, args.interpreted, form)
    yield from report.report(args.workloads or report.DEFAULT, request)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for an option of another way to predict."""
    counted, persistent = args.sass, args.backend == "cuda"
    if args.out and not (counted or persistent):
        raise ValueError("out: expected with --sass or --backend cuda, whose table it is")
    if args.launches and not counted:
        raise ValueError("launches: expected with --sass, whose table it is")
    if (args.tasks or args.steps or args.interpreted or args.form or args.table) and not persistent:
        raise ValueError("tasks, steps, interpreted, form, table: expected with --backend cuda")
    if args.form and args.interpreted:
        raise ValueError("form: expected without --interpreted, whose programs compute in float32")
    if args.table and (args.workloads or args.tasks or args.steps or args.interpreted or args.form or args.out):
        raise ValueError("table: expected with --device alone, for it has kernels and sizes of its own")
    if persistent and (counted or args.precision != ("fp32",)):
        raise ValueError("backend: cuda is one kernel in fp32, which knows neither --sass nor --precision")


def run(args: argparse.Namespace) -> int:
    """Run it; the exit status."""
    _check(args)
    found = _persistent(args) if args.backend == "cuda" else _sass(args) if args.sass else _first(args)
    for line in found:
        print(line, flush=True)
    return 0


def add(commands: Commands) -> None:
    """The command and its options."""
    p = commands.add_parser(
        "predict",
        help="calls, FLOPs, bytes and predicted time of a meta-step on a GPU",
        description="By the schedule: its calls, FLOPs and bytes. With --sass by the kernels that Triton makes of it, "
        "compiled for the chip, which need not be there, and counted instruction by instruction: about a second for "
        "each distinct kernel the first time, which are kept under XDG_CACHE_HOME; of `heads` (linear heads and "
        "multi-head losses) some programs of each launch run, instruction by instruction. With --backend cuda by the "
        "persistent kernel: nvcc compiles it for the chip, and a task runs through its instructions, one by one.",
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
    p.add_argument("--backend", choices=("triton", "cuda"), default="triton", help="whose launches (default triton)")
    p.add_argument("--tasks", type=_numbers, default=(), help="with --backend cuda: some numbers of tasks")
    p.add_argument("--steps", type=_numbers, default=(), help="with --backend cuda: some numbers of inner steps")
    p.add_argument("--interpreted", action="store_true", help="with --backend cuda: perceptrons by a program too")
    p.add_argument("--form", choices=("tf32", "tf32x3"), default="", help="with --backend cuda: as backend='cuda:FORM'")
    p.add_argument("--table", action="store_true", help="with --backend cuda: write what explain() predicts by")
    p.add_argument("--sass", action="store_true", help="of the compiled launches, beside the first prediction")
    p.add_argument("--worst", type=positive, default=5, help="longest launches or phases (default %(default)s)")
    p.add_argument("--out", default="", metavar="CSV", help="the table as a file")
    p.add_argument("--launches", default="", metavar="DIR", help="with --sass: files of all launches in order")
    p.set_defaults(call=run)
