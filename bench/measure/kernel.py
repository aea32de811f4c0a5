"""``python -m bench kernel OP``: one kernel on one shape, without the layer above it.

Time, GFLOP/s, GB/s of compulsory traffic, and the share of the peak measured in the same run, for each mode: ``adapt``
(the inner loop alone), ``forward`` (and the query loss; nothing is kept for a gradient), ``forward+backward`` (and the
exact meta-gradient). Several numbers of inner steps are timed in turn in one process, so that their ratios hold on a
machine whose speed drifts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from bench.measure import blocks, flops, peak, timing
from bench.workloads import Sine, Workload, make_data, make_network, mlp

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sine": Sine}
MODES: tuple[flops.Mode, ...] = get_args(flops.Mode)
LOSSES = ("cross_entropy", "mse")


@dataclass(frozen=True)
class Options:
    """One kernel's problem. ``shape``: the widths of an MLP, inputs first."""

    shape: tuple[int, ...]
    tasks: int = 32
    support: int = 5
    query: int = 75
    steps: int = 1
    lr: float = 0.01
    loss: str = "cross_entropy"
    activation: str = "relu"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    modes: tuple[flops.Mode, ...] = MODES
    inputs: bool = False
    threads: int = 0
    seconds: float = 2.0
    rule: str = "adam"

    @property
    def workload(self) -> Workload:
        def build() -> nn.Module:
            return mlp(*self.shape, activation=ACTIVATIONS[self.activation])

        return Workload(
            "kernel",
            f"MLP {'-'.join(map(str, self.shape))}",
            build,
            self.tasks,
            self.support,
            self.query,
            self.shape[:1],
            self.shape[-1],
            self.steps,
            self.lr,
            self.loss,
            inputs=self.inputs,
        )


@dataclass(frozen=True)
class Measured:
    """One mode of one kernel at one number of steps; ``ratio``: its time over that of the first number."""

    mode: str
    steps: int
    ms: float
    best_ms: float
    iqr_ms: float
    n: int
    gflops: float
    gbs: float
    share_of_peak: float
    ratio: float = 1.0


def parse_steps(text: str) -> tuple[int, ...]:
    """``1,10,100`` -> (1, 10, 100). Raises ValueError for anything but different whole numbers >= 0."""
    counts = tuple(int(part) for part in text.split(",")) if re.fullmatch(r"\d+(,\d+)*", text) else ()
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"steps: expected different whole numbers such as 5 or 1,10,100, got {text!r}")
    return counts


def parse_shape(text: str) -> tuple[int, ...]:
    """``784-256-5`` -> (784, 256, 5). Raises ValueError for anything else."""
    try:
        sizes = tuple(int(part) for part in text.split("-"))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"shape: expected widths such as 784-256-128-64-64-5, got {text!r}")
    return sizes


def inner_loop(o: Options, mode: flops.Mode) -> Callable[[], object]:
    """A call of ``mtml::inner_loop`` by its eager door."""
    from mtml_kernels.losses import LossSpec
    from mtml_kernels.ops.inner_loop import inner_loop_call
    from mtml_kernels.program import trace
    from mtml_kernels.schema.inner_loop import KEEP_LAST, KEEP_NONE, InnerLoopSpec

    w = o.workload
    net = make_network(w, o.dtype)
    sx, sy, qx, qy = make_data(w, o.dtype)
    program, named = trace(net, [w.x]), dict(net.named_parameters())
    params: list[Tensor] = [named[info.name] for info in program.params]
    adapting, gradient = mode == "adapt", mode == "forward+backward"
    loss, keep = LossSpec(w.loss), KEEP_LAST if adapting else KEEP_NONE
    spec = InnerLoopSpec.of(program, [True] * len(params), (loss, loss), steps=w.steps, keep=keep)
    lr = [torch.full((1,), w.lr, dtype=o.dtype)]
    query_x, query_y = ([], None) if adapting else ([qx], qy)
    leaves = [*params, *([sx, qx] if w.inputs else [])]

    def call() -> object:
        with torch.set_grad_enabled(gradient):
            out = inner_loop_call(spec, params, [sx], sy, query_x, query_y, None, None, lr, None, o.backend)
            return torch.autograd.grad(out[0].mean(), leaves) if gradient else out

    return call


def head_inner_loop(o: Options, mode: flops.Mode) -> Callable[[], object]:
    """A call of ``head_inner_loop`` in its Gram form on a shape of two widths."""
    from mtml_kernels import head_inner_loop as run

    if len(o.shape) != 2:
        raise ValueError(f"shape: expected features-classes such as 1600-5 for head_inner_loop, got {o.shape}")
    w = o.workload
    head = make_network(w, o.dtype)[0]  # type: ignore[index]
    sx, sy, qx, qy = make_data(w, o.dtype)
    adapting, gradient = mode == "adapt", mode == "forward+backward"
    leaves = [head.weight, head.bias, *([sx, qx] if w.inputs else [])]

    def call() -> object:
        with torch.set_grad_enabled(gradient):
            query, labels = (qx[:, :0], None) if adapting else (qx, qy)
            sets = (sx, sy, query, head.weight, head.bias, w.lr)
            out = run(
                *sets, steps=w.steps, loss=w.loss, query_labels=labels, adapted=adapting, form="gram", backend=o.backend
            )
            return torch.autograd.grad(out.loss.mean(), leaves) if gradient else out

    return call


def _block(op: str, o: Options, mode: flops.Mode) -> Callable[[], object]:
    """A call of a building block."""
    return blocks.BLOCKS[op](o).call(mode == "forward+backward")


def _work(op: str, o: Options, mode: flops.Mode) -> tuple[float, float]:
    """(FLOPs, compulsory bytes) of a call."""
    if op in blocks.BLOCKS:
        return blocks.BLOCKS[op](o).work(mode == "forward+backward")
    w = o.workload
    return flops.meta_step(w, mode=mode), flops.meta_step_bytes(w, o.dtype.itemsize, mode)


OPS: dict[str, Callable[[Options, flops.Mode], Callable[[], object]]] = {
    "inner_loop": inner_loop,
    "head_inner_loop": head_inner_loop,
    **{name: partial(_block, name) for name in blocks.BLOCKS},
}


def measure(op: str, o: Options, steps: Sequence[int] = ()) -> tuple[list[Measured], peak.Peak]:
    """Time the modes of one kernel, at each of these numbers of steps (default: the one in ``o``), all in turn, beside
    the machine's peak.
    """
    threads = o.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    before = peak.measure(o.dtype, threads)
    cases = {f"{mode} {count}": (mode, replace(o, steps=count)) for mode in o.modes for count in steps or (o.steps,)}
    times = timing.interleave({name: OPS[op](case, mode) for name, (mode, case) in cases.items()}, o.seconds)
    best = peak.higher(before, peak.measure(o.dtype, threads))
    rows: list[Measured] = []
    first = {mode: next(times[name].ms for name, (m, _) in cases.items() if m == mode) for mode in o.modes}
    for name, (mode, case) in cases.items():
        t, (work, moved) = times[name], (number / 1e9 for number in _work(op, case, mode))
        rate = work / t.ms * 1e3
        speeds = (rate, moved / t.ms * 1e3, rate / best.gflops)
        rows.append(Measured(mode, case.steps, t.ms, t.best_ms, t.iqr_ms, t.n, *speeds, t.ms / first[mode]))
    return rows, best


def report(op: str, o: Options, steps: Sequence[int] = ()) -> list[Measured]:
    """Measure and print."""
    block = op in blocks.BLOCKS
    if block:  # one step of no loop
        steps, o = (1,), replace(o, modes=tuple(mode for mode in o.modes if mode in blocks.MODES))
    counts = tuple(steps) or (o.steps,)
    rows, best = measure(op, o, counts)
    problem = (
        f"{op} {o.workload.network} {o.activation}, {o.tasks} tasks, {o.support} support, {o.query} query, "
        f"{','.join(map(str, counts))} steps, {o.loss}, {o.dtype}, backend {o.backend}"
    )
    print(
        f"{blocks.describe(op, o) if block else problem}, {torch.get_num_threads()} threads; "
        f"peak {best.gflops:.0f} GFLOP/s ({best.source}), copy {peak.copy_bandwidth():.1f} GB/s"
    )
    for r in rows:
        which = f"  K={r.steps:<5d} x {r.ratio:<7.2f}" if len(counts) > 1 else ""
        print(
            f"{r.mode:18s}{which} {r.ms:10.4f} ms  best {r.best_ms:10.4f}  "
            f"IQR {r.iqr_ms:8.4f}  n={r.n:<4d} {r.gflops:8.2f} GFLOP/s ({r.share_of_peak:5.1%})  {r.gbs:7.2f} GB/s"
        )
    return rows


def modes(names: Sequence[str]) -> tuple[flops.Mode, ...]:
    """Checked mode names; ``all`` or nothing is every mode."""
    if not names or "all" in names:
        return MODES
    chosen = tuple(mode for mode in MODES if mode in names)
    if len(chosen) != len(set(names)):
        raise ValueError(f"mode: expected some of all, {', '.join(MODES)}; got {', '.join(names)}")
    return chosen
