"""What a workload has to do on a GPU, and how long that is predicted to take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import flops
from bench.workloads import Workload
from bench.workloads.heads import Draw
from mtml_kernels.schedule.cost import Cost, Product
from mtml_kernels.schedule.describe import Description
from mtml_kernels.schedule.devices import LAUNCH_SECONDS, SHARE, Device, device_named
from mtml_kernels.schedule.predict import predict as predict_call

HALF = (torch.float16, torch.bfloat16)


class Work(NamedTuple):
    """FLOPs and bytes, the predicted seconds and calls on a device, and the schedule where there is one."""

    flops: int
    bytes: int
    seconds: float
    calls: int
    schedule: Description | None = None

    def __str__(self) -> str:
        done = f"{self.flops / 1e9:9.3f} GFLOP {self.bytes / 1e6:9.1f} MB"
        return f"{self.calls:4d} calls {done}, predicted {1e6 * self.seconds:7.0f} us"


def of_meta_step(w: Workload, device: Device) -> Work:
    """By the schedule; of a single linear layer by its Gram form, one call there and one back, where it is cheaper."""
    from bench.report.predict import predict

    found = predict(w, device, "fp32")
    products = sum(product.flops for line in found.lines for product in line.cost.products)
    least = flops.meta_step(w, "all")
    if least >= products:
        return Work(found.flops, found.bytes, found.seconds, len(found.lines), found)
    product = Product(w.tasks, w.support, w.support, least // 4)  # of each of the two calls
    half = Cost((product,), 0, flops.meta_step_bytes(w) // 2, 0)
    return Work(least, 2 * half.bytes, 2 * predict_call(half, device).seconds, 2)


class _Shapes(Draw):
    """Draws tensors without memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, "meta", 0)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    def labels(self, classes: int, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")


def of_losses(case: str, dtype: torch.dtype, device: Device) -> Work:
    """Forward and backward of a case of ``bench.gpu.multihead_loss``: every leaf read and its gradient written once.

    Of linear heads three products each; their logits are not counted, for a fused loss need not write them. In half
    precision tensor cores take twice as many products as in TF32, on each of the GPUs whose numbers are known.
    """
    from bench.gpu.multihead_loss import CASES

    heads: Any = CASES[case](_Shapes(dtype))
    moved = 2 * sum(z.nbytes for z in heads.leaves)
    if not heads.linear:
        return Work(0, moved, 2 * LAUNCH_SECONDS + moved / device.bandwidth, 2)
    done = 6 * sum(heads.leaves[0].numel() * len(w) for w in heads.leaves[1:])
    rate = 2 * SHARE["tf32"] * device.tf32 if dtype in HALF else SHARE["fp32"] * device.fp32
    return Work(done, moved, 3 * LAUNCH_SECONDS + max(done / rate, moved / device.bandwidth), 3)


def device_here(fallback: str = "h200") -> tuple[Device | None, str]:
    """The GPU's numbers, or None where they are not known, and its name; without one those of ``fallback``."""
    from mtml_kernels.schedule.devices import DEVICES

    if not torch.cuda.is_available():
        return DEVICES[fallback], DEVICES[fallback].name
    name = torch.cuda.get_device_name()
    return device_named(name), name


def rates(work: Work, ms: float) -> tuple[float, float]:
    """(TFLOP/s, TB/s) of doing it in that time; NaN where there is no time."""
    if not ms > 0:
        return math.nan, math.nan
    return work.flops / ms / 1e9, work.bytes / ms / 1e9
