"""``python -m bench triton-report OP``: times over a shape axis in the form of Triton's ``perf_report``.

    from bench.report.triton_report import Request, triton_report

    triton_report(Request("inner_loop", axis="steps", values=(1, 5, 10))).run(print_data=True, save_path="out")

What comes back is Triton's own ``Mark`` around its own ``Benchmark``: x_names is the axis, lines are the providers,
ours and the peers, and every point is the median with its 0.2 and 0.8 quantiles. A provider that is not installed,
cannot run or whose result is wrong has no point, and says so.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.measure import timing
from bench.report.triton_ops import OPS, Point

if TYPE_CHECKING:
    from triton.testing import Mark

Run = Callable[[], Any]
Quantiles = tuple[float, float, float]
"""Milliseconds: the median, and the quantiles 0.2 and 0.8."""
Timer = Callable[[Run], Quantiles]
ORDER = (0.5, 0.2, 0.8)
NONE: Quantiles = (math.nan, math.nan, math.nan)
METRICS = {"ms": "ms", "tflops": "TFLOP/s"}


def wall(run: Run, rounds: int = 11, seconds: float = timing.BURST_SECONDS) -> Quantiles:
    """Wall time, on any device: of bursts as ``bench run`` takes them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = timing.calibrate(run, device, seconds)
    times = [1e3 * timing.burst(run, count, device) / count for _ in range(rounds)]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[-1]


def _of_triton(name: str) -> Timer:
    def timer(run: Run) -> Quantiles:
        import triton
        from triton import testing

        measure = getattr(testing, name, None)
        if measure is None:
            raise ValueError(f"timer: triton {triton.__version__} has no {name}; expected wall, do_bench or cudagraph")
        median, low, high = measure(run, quantiles=list(ORDER))
        return float(median), float(low), float(high)

    return timer


TIMERS: dict[str, Timer] = {
    "wall": wall,
    "do_bench": _of_triton("do_bench"),
    "cudagraph": _of_triton("do_bench_cudagraph"),
    "proton": _of_triton("do_bench_proton"),
}
"""``wall`` is ours; the others are Triton's: L2 flushed before each call, in a CUDA graph, by its profiler."""


@dataclass(frozen=True)
class Request:
    """What is asked for. Empty or 0: what the op has by default; ``sizes`` fixes what is no axis."""

    op: str
    axis: str = ""
    values: tuple[int, ...] = ()
    providers: tuple[str, ...] = ()
    timer: str = ""
    device: str = "cuda"
    metric: str = "ms"
    workload: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    def complete(self) -> Request:
        """With defaults for what is empty. Raises ValueError naming what is wrong and the choices."""
        _one_of("op", self.op, OPS)
        op = OPS[self.op]
        axis = self.axis or op.axis
        _one_of("axis", axis, op.sizes)
        for name in self.sizes:
            _one_of("sizes", name, op.sizes)
        if self.workload:
            _one_of("workload", self.workload, op.workloads or ("none: this op has no workloads",))
        timer = self.timer or ("wall" if self.device == "cpu" else "do_bench")
        _one_of("timer", timer, TIMERS)
        _one_of("metric", self.metric, METRICS)
        if timer != "wall" and self.device == "cpu":
            raise ValueError(f"timer: {timer!r} is a GPU's; for device 'cpu' expected 'wall'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: no NVIDIA GPU that PyTorch can use; --device cpu takes the CPU's providers")
        values = self.values or op.values.get(axis, ())
        if not values or min(values) < 1:
            raise ValueError(f"values: expected numbers >= 1 for axis {axis!r}, got {values or 'none'}")
        providers = self.providers or op.providers[self.device]
        return replace(self, axis=axis, timer=timer, values=values, providers=providers)


def numbers(text: str) -> tuple[int, ...]:
    """``1,5,10`` -> (1, 5, 10); nothing of an empty text. Raises ValueError for anything else."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"values: expected whole numbers such as 1,5,10, got {text!r}")
    return tuple(map(int, words))


def _one_of(what: str, name: str, choices: Any) -> None:
    if name not in choices:
        raise ValueError(f"{what}: expected one of {', '.join(choices)}; got {name!r}")


def _measure(request: Request, point: Point, timer: Timer, say: Callable[[str], None]) -> Quantiles:
    if point.run is None:
        say(f"{request.op}: {point.what}: {point.why}")
        return NONE
    median, low, high = timer(point.run)
    if request.metric == "ms":
        return median, low, high
    return point.flops / median / 1e9, point.flops / high / 1e9, point.flops / low / 1e9


def triton_report(request: Request, timer: Timer | None = None, say: Callable[[str], None] = print) -> Mark:
    """The request as ``triton.testing.perf_report`` makes it; ``timer`` takes the place of the one that is named."""
    from triton import testing

    request = request.complete()
    op, clock = OPS[request.op], timer or TIMERS[request.timer]

    def point(provider: str, **sizes: int) -> Quantiles:
        return _measure(request, op.point(provider, request.workload, request.device, sizes), clock, say)

    name = "-".join(filter(None, (request.op, request.workload, request.axis)))
    benchmark = testing.Benchmark(
        x_names=[request.axis],
        x_vals=list(request.values),
        x_log=True,
        line_arg="provider",
        line_vals=list(request.providers),
        line_names=list(request.providers),
        ylabel=METRICS[request.metric],
        plot_name=f"{name}-{request.timer}",
        args=dict(request.sizes),
    )
    mark: Mark = testing.perf_report(benchmark)(point)
    return mark


def save(mark: Mark, folder: Path) -> None:
    """Let Triton print and plot the report. Raises ValueError where a package that it does so with is missing."""
    for package in ("pandas", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"save: Triton's report needs {package}, which is not installed (pip install {package})")
    folder.mkdir(parents=True, exist_ok=True)
    mark.run(print_data=True, save_path=str(folder))


def lines(mark: Mark) -> Iterator[str]:
    """The report as a table, measured line by line: what ``Mark.run`` prints, without pandas."""
    b = mark.benchmarks
    yield f"{b.plot_name} ({b.ylabel}; median, and quantiles 0.2 and 0.8)"
    yield f"{b.x_names[0]:>10s} " + " ".join(f"{name:>32s}" for name in b.line_names)
    for x in b.x_vals:
        found = [mark.fn(**{b.x_names[0]: x, b.line_arg: name}, **b.args) for name in b.line_vals]
        yield f"{x:10d} " + " ".join(f"{m:12.4f} ({low:8.4f} {high:8.4f})" for m, low, high in found)
