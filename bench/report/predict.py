"""``python -m bench predict``: what meta-steps cost on a GPU that need not be there, from their schedules.

Calls, FLOPs and bytes are counted (`mtml_kernels/schedule/cost.py`); the times are a model's
(`mtml_kernels/schedule/predict.py`), and no measurement. They are those of a CUDA graph: the host's time is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bench.workloads import Workload, make_network, select
from mtml_kernels.program import trace
from mtml_kernels.schedule.describe import Description, describe
from mtml_kernels.schedule.devices import DEVICES, LAUNCH_SECONDS, SHARE, Device, Precision
from mtml_kernels.schedule.predict import BOUNDS
from mtml_kernels.schema.inner_loop import (
    NEED_PARAMS,
    NEED_QUERY_X,
    NEED_SUPPORT_X,
    InnerLoopArgs,
    InnerLoopSpec,
)
from mtml_kernels.schema.losses import LossSpec

DEFAULT = ("sinusoid", "siren", "omniglot_mlp", "omniglot_conv", "mini_conv")


def meta_step(w: Workload) -> InnerLoopArgs:
    """The workload's meta-step as the engine's call, of tensors without memory."""
    net = make_network(w)
    program, tensors = trace(net, [w.x]), dict(net.named_parameters())
    loss = LossSpec(w.loss)
    spec = InnerLoopSpec.of(program, [True] * len(program.params), (loss, loss), steps=w.steps)

    def x(samples: int) -> list[Tensor]:
        return [torch.empty(w.tasks, samples, *w.x, device="meta")]

    def y(samples: int) -> Tensor:
        if w.loss == "mse":
            return torch.empty(w.tasks, samples, w.out, device="meta")
        return torch.empty(w.tasks, samples, dtype=torch.long, device="meta")

    return InnerLoopArgs(
        params=[tensors[p.name].detach().to("meta") for p in program.params],
        lr=[torch.empty(1, device="meta")],
        support_x=x(w.support),
        query_x=x(w.query),
        hyper=[],
        moments=[],
        support_y=y(w.support),
        query_y=y(w.query),
        support_mask=None,
        query_mask=None,
        step_weights=None,
        spec=spec,
        needs=NEED_PARAMS | (NEED_SUPPORT_X | NEED_QUERY_X if w.inputs else 0),
    )


def predict(w: Workload, device: Device, precision: Precision) -> Description:
    """The calls of the workload's meta-step.

    >>> from bench.workloads import WORKLOADS
    >>> len(predict(WORKLOADS["siren"], DEVICES["h200"], "fp32").lines) <= 58
    True
    """
    return describe(meta_step(w), device, precision)


def head(device: Device, precision: Precision) -> list[str]:
    """What the predictions rest on, and the names of the columns."""
    peak = device.peak(precision) / 1e12
    return [
        f"predicted for {device.name}, {precision}: {peak:.4g} TFLOP/s, of which {SHARE[precision]:.0%} are reached, "
        f"{device.bandwidth / 1e12:.3g} TB/s, {1e6 * LAUNCH_SECONDS:.1f} us a launch",
        "the columns after us: how much of it is in calls bound by that",
        f"{'workload':20s} {'calls':>5s} {'GFLOP':>9s} {'MB':>9s} {'us':>9s}  "
        + " ".join(f"{name:>10s}" for name in (*BOUNDS, "mostly")),
    ]


def row(name: str, found: Description) -> str:
    """One workload."""
    split = " ".join(f"{1e6 * found.by_bound[bound]:10.0f}" for bound in BOUNDS)
    work = f"{len(found.lines):5d} {found.flops / 1e9:9.3f} {found.bytes / 1e6:9.1f} {1e6 * found.seconds:9.0f}"
    return f"{name:20s} {work}  {split} {found.bound:>10s}"


def report(names: Iterable[str], device: str, precision: Precision, calls: bool) -> Iterator[str]:
    """The table, line by line; with `calls` every call below its workload."""
    gpu = DEVICES[device]
    workloads = select(names)
    yield from head(gpu, precision)
    for w in workloads:
        found = predict(w, gpu, precision)
        yield row(w.name, found)
        if calls:
            yield from map(str, found.lines)
