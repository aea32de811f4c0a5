"""The command line: ``python -m bench COMMAND``; ``--help`` lists them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.arguments import Commands, names, positive
from bench.commands import (
    autocast,
    compat,
    contention,
    export,
    gpu,
    multitask,
    predict,
    ranks,
    results,
    task_map,
    transfer,
    triton,
)

if TYPE_CHECKING:
    import torch

DEFAULT_WORKLOADS = ("sinusoid", "omniglot_mlp", "siren")


def _prefer_installed() -> None:
    """Search this checkout last: the package folder in its root must not shadow an installed, compiled package."""
    root = Path(__file__).resolve().parent.parent
    here = [p for p in sys.path if Path(p or ".").resolve() == root]
    sys.path[:] = [p for p in sys.path if p not in here] + ([str(root)] if here else [])


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "float64": torch.float64}[name]


def run(args: argparse.Namespace) -> int:
    from bench import providers
    from bench.measure import runner
    from bench.report import record

    options = runner.Options(args.providers, args.seconds, args.threads, _dtype(args.dtype), args.device)
    records = runner.run(args.workloads or DEFAULT_WORKLOADS, options)
    if args.out:
        record.write_csv(args.out, records, append=args.append)
        print(f"wrote {args.out}")
    wrong = [r for r in records if providers.is_ours(r.provider) and r.status in ("mismatch", "failed")]
    return 1 if wrong else 0


def compare(args: argparse.Namespace) -> int:
    from bench.report import compare as comparing
    from bench.report import record

    base, head = record.read_csv(args.base), record.read_csv(args.head)
    verdicts = comparing.compare(base, head, args.tolerance, args.metric, args.peers)
    if not verdicts:
        print(f"{args.base}: no timed row of this project to compare (peers: pass --peers)", file=sys.stderr)
        return 2
    for verdict in verdicts:
        print(comparing.line(verdict))
    regressions = sum(v.regressed for v in verdicts)
    unclear = sum(v.verdict == "ambiguous" for v in verdicts)
    print(f"{regressions} regressions among {len(verdicts)} rows, tolerance {args.tolerance:.0%}; {unclear} ambiguous")
    return 1 if regressions else 0


def plot(args: argparse.Namespace) -> int:
    from bench.report import plot as plotting
    from bench.report import record

    out = args.out or str(Path(args.csv).with_suffix(".png"))
    plotting.plot(record.read_csv(args.csv), out)
    print(f"wrote {out}")
    return 0


def readme(args: argparse.Namespace) -> int:
    from bench.report import readme as writing

    target = args.readme or writing.document(args.table)
    writing.write(target, writing.read(args.csv, args.table), args.table)
    print(f"wrote the table into {target}")
    return 0


def kernel(args: argparse.Namespace) -> int:
    from bench.measure import kernel as kernels

    if args.op not in kernels.OPS:
        raise ValueError(f"op: expected one of {', '.join(kernels.OPS)}; got {args.op!r}")
    steps = kernels.parse_steps(args.steps)
    kernels.report(
        args.op,
        kernels.Options(
            kernels.parse_shape(args.shape),
            args.tasks,
            args.support,
            args.query,
            steps[0],
            args.lr,
            args.loss,
            args.activation,
            _dtype(args.dtype),
            args.backend,
            kernels.modes(args.mode),
            args.inputs,
            args.threads,
            args.seconds,
            args.rule,
        ),
        steps,
    )
    return 0


def memory(args: argparse.Namespace) -> int:
    import torch

    from bench.measure import memory as remembering
    from bench.workloads import select
    from bench.workloads.inner import WORKLOADS as INNER

    steps, threads = [int(s) for s in names(args.steps)], args.threads or torch.get_num_threads()
    w = INNER.get(args.workload) or select([args.workload])[0]
    chosen = args.providers or remembering.default(w)
    if args.here:
        print(json.dumps(remembering.measure_here(replace(w, steps=steps[0]), chosen[0], threads)))
        return 0
    usages = remembering.report(args.workload, steps, chosen, threads)
    return 1 if any(u.error for u in usages) else 0


def host(args: argparse.Namespace) -> int:
    from bench.measure import host as hosting
    from bench.measure import host_cuda
    from bench.report import record

    measure, by = hosting.measure, "the CPU engine without what it computes"
    if args.backend == "cuda":
        measure, by = host_cuda.measure, "backend cuda without its kernels"
    times, where = measure(args.workload, args.seconds), record.environment()
    for name, took in (("mtml_kernels.inner_loop", times.function), ("mtml.MAML", times.module)):
        print(
            f"{args.workload}, {name} by {by}: {1e3 * took.ms:.1f} us (best {1e3 * took.best_ms:.1f}), "
            f"{took.ms / times.nothing.ms:.2f} times an autograd.Function that does nothing"
        )
    print(
        f"the Function: {1e3 * times.nothing.ms:.1f} us (best {1e3 * times.nothing.best_ms:.1f}); there and back, "
        f"the thread's own time, medians of {times.nothing.n} rounds in turn; {where['machine']}, torch "
        f"{where['torch']}, {where['sha']}"
    )
    if args.backend == "cpu":
        between = hosting.measure_between(args.workload, args.seconds)
        print(
            f"with the engine, less the time inside it: mtml.MAML {1e3 * between.ms:.1f} us (best "
            f"{1e3 * between.best_ms:.1f}), as its work leaves other things in the caches"
        )
    return 0


def checksum(args: argparse.Namespace) -> int:
    import torch

    from bench.measure import checksum as summing
    from bench.measure import runner

    names = args.workloads or runner.names()
    for name in names:
        runner.find(name)  # raises for one that does not exist
    lines = summing.lines if args.here else summing.every_instruction_set
    for line in lines(names, args.threads or torch.get_num_threads()):
        print(line, flush=True)
    return 0


def _add_threads(p: argparse.ArgumentParser, seconds: float) -> None:
    p.add_argument("--threads", type=positive, default=0, help="default: torch's own number")
    _add_seconds(p, seconds)


def _add_seconds(p: argparse.ArgumentParser, seconds: float) -> None:
    p.add_argument(
        "--seconds", type=float, default=seconds, help="time budget per provider or mode (default %(default)s)"
    )


def _add_run(commands: Commands) -> None:
    p = commands.add_parser("run", help="gate and time providers on workloads, side by side", description=run_help())
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"default: {' '.join(DEFAULT_WORKLOADS)}")
    p.add_argument(
        "--providers", type=names, default=(), help="comma-separated, options after a colon: mtml,compile:loop"
    )
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--out", help="CSV file for the records")
    p.add_argument("--append", action="store_true", help="keep the records that --out already holds")
    _add_threads(p, 8.0)
    p.set_defaults(call=run)


def run_help() -> str:
    return (
        "Every provider is first checked against the plain loop in float64; one that does not match is reported and "
        "not timed. The others are timed in turn, in bursts of at least 20 ms. Peers that are not installed are named "
        "and skipped. Exit status 1 where this project's own provider failed or did not match."
    )


def _add_files(commands: Commands) -> None:
    p = commands.add_parser("compare", help="base against head: exit status 1 on a regression")
    p.add_argument("base")
    p.add_argument("head")
    p.add_argument(
        "--tolerance", type=float, default=0.05, help="how much slower is a regression (default %(default)s)"
    )
    p.add_argument(
        "--metric", choices=("auto", "ms"), default="auto", help="auto: the ratio to the fastest peer both runs have"
    )
    p.add_argument("--peers", action="store_true", help="judge the peers' times too")
    p.set_defaults(call=compare)
    p = commands.add_parser("plot", help="bars of recorded times")
    p.add_argument("csv")
    p.add_argument("--out", help="image file (default: beside the CSV)")
    p.set_defaults(call=plot)
    p = commands.add_parser("readme", help="write a speed table of README or docs/benchmarks.md from recorded times")
    p.add_argument("csv")
    p.add_argument("--readme", help="another document (default: the one of the two that has the table)")
    p.add_argument("--table", default="", help="which table: the NAME in <!-- bench:NAME:start -->; README's has none")
    p.set_defaults(call=readme)


def _add_kernel(commands: Commands) -> None:
    p = commands.add_parser("kernel", help="one kernel on one shape: time, GFLOP/s, GB/s, share of peak")
    p.add_argument("op", help="inner_loop, head_inner_loop, task_linear, task_conv2d, task_update")
    p.add_argument("--shape", default="784-256-128-64-64-5", help="widths of an MLP (default %(default)s)")
    p.add_argument("--rule", default="adam", help="of task_update: sgd, adam, adamw, rmsprop (default %(default)s)")
    for name, value in (("tasks", 32), ("support", 5), ("query", 75)):
        p.add_argument(f"--{name}", type=positive, default=value, help="default %(default)s")
    p.add_argument(
        "--steps", default="1", help="inner steps; several, as 1,10,100, are timed in turn (default %(default)s)"
    )
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--loss", choices=("cross_entropy", "mse"), default="cross_entropy")
    p.add_argument("--activation", choices=("relu", "tanh", "gelu", "sine"), default="relu")
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    p.add_argument("--backend", default="auto", help="auto, cpu, reference, ...")
    p.add_argument("--mode", action="append", default=[], help="adapt, forward, forward+backward or all; repeatable")
    p.add_argument("--inputs", action="store_true", help="gradients to the inputs too")
    _add_threads(p, 2.0)
    p.set_defaults(call=kernel)


def _add_costs(commands: Commands) -> None:
    p = commands.add_parser("memory", help="peak memory of a meta-step at several numbers of inner steps")
    p.add_argument("workload", nargs="?", default="omniglot_mlp")
    p.add_argument("--steps", default="1,10,100", help="default %(default)s")
    p.add_argument(
        "--providers", type=names, default=(), help="default: mtml,loop,mixflow,mixflow:loop; the first is the unit"
    )
    p.add_argument("--threads", type=positive, default=0)
    p.add_argument("--here", action="store_true", help="the first combination, in this process, printed as JSON")
    p.set_defaults(call=memory)
    p = commands.add_parser("host", help="host time of a meta-step: what is spent outside native code")
    p.add_argument("workload", nargs="?", default="sinusoid")
    p.add_argument(
        "--backend",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: with its kernels replaced by nothing, on any machine",
    )
    _add_seconds(p, 2.0)
    p.set_defaults(call=host)
    p = commands.add_parser("checksum", help="sha256 of loss and gradients: does a change keep every bit?")
    p.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all")
    p.add_argument("--threads", type=positive, default=0, help="default: torch's own number")
    p.add_argument("--here", action="store_true", help="only the instruction set that is chosen in this process")
    p.set_defaults(call=checksum)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of mtml-kernels.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    for module in (
        gpu,
        triton,
        export,
        predict,
        ranks,
        task_map,
        autocast,
        compat,
        multitask,
        transfer,
        contention,
        results,
    ):
        module.add(commands)
    _add_files(commands)
    _add_kernel(commands)
    _add_costs(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Bad input is one line on standard error and status 2."""
    args = parser().parse_args(argv)
    try:
        status: int = args.call(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    _prefer_installed()
    sys.exit(main())
