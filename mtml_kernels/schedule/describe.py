"""A schedule in numbers, call by call: for `explain()` and `python -m bench predict`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schedule.call import Schedule
from mtml_kernels.schedule.cost import Cost, costs
from mtml_kernels.schedule.devices import DEVICES, Device, Precision, device_named
from mtml_kernels.schedule.predict import Prediction, by_bound, predict
from mtml_kernels.schema.inner_loop import InnerLoopArgs

__all__ = ["SCHEDULED", "Description", "Line", "describe", "device_of", "with_article"]

SCHEDULED = frozenset({"torch", "triton"})  # backends of the inner loop that run it by a schedule


@dataclasses.dataclass(frozen=True)
class Line:
    """One call: what it does in the words of the program, its parts, its work, its predicted time."""

    where: str
    name: str
    cost: Cost
    predicted: Prediction

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the time in microseconds."""
        return {
            "where": self.where,
            "name": self.name,
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "us": round(1e6 * self.predicted.seconds, 2),
            "bound": self.predicted.bound,
        }

    def __str__(self) -> str:
        work = f"{self.cost.flops / 1e9:9.4f} GFLOP {self.cost.bytes / 1e6:9.3f} MB"
        time = f"{1e6 * self.predicted.seconds:9.2f} us  {self.predicted.bound:10s}"
        return f"{work} {time} {self.where}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Description:
    """All calls of the way there and of the way back."""

    device: Device
    precision: Precision
    lines: tuple[Line, ...]

    @property
    def flops(self) -> int:
        """Of all calls."""
        return sum(line.cost.flops for line in self.lines)

    @property
    def bytes(self) -> int:
        """That all calls read and write."""
        return sum(line.cost.bytes for line in self.lines)

    @property
    def seconds(self) -> float:
        """Predicted, in a CUDA graph."""
        return sum(line.predicted.seconds for line in self.lines)

    @property
    def by_bound(self) -> dict[str, float]:
        """The same, split by what bounds each call."""
        return by_bound([line.predicted for line in self.lines])

    @property
    def bound(self) -> str:
        """What bounds the calls that take most of the time."""
        split = self.by_bound
        return max(split, key=lambda name: split[name])

    def __str__(self) -> str:
        return (
            f"{len(self.lines)} calls, {self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB; predicted "
            f"{1e6 * self.seconds:.0f} us in {self.precision} on {with_article(self.device.name)} "
            f"({self.by_bound[self.bound] / max(self.seconds, 1e-12):.0%} of it in calls bound by {self.bound})"
        )


def with_article(name: str) -> str:
    """For names that are spelt out: an A100, an H200, an L4, an RTX 4090."""
    return f"{'an' if name[0] in 'AEFHILMNORSX' else 'a'} {name}"


def device_of(device: torch.device) -> tuple[Device, bool]:
    """(The numbers of the GPU on which tensors lie, True); those of an H200 and False where they are not known."""
    known = device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return (DEVICES["h200"], False) if known is None else (known, True)


def _lines(schedule: Schedule, device: Device, precision: Precision) -> list[Line]:
    counted = zip(schedule.calls, costs(schedule), strict=True)
    return [Line(call.where, call.name, cost, predict(cost, device, precision)) for call, cost in counted]


def describe(a: InnerLoopArgs, device: Device, precision: Precision | None = None) -> Description:
    """The calls of an inner loop and, where it wants gradients, of the usual way back.

    Args:
        a: a call; only shapes and dtypes of its tensors are looked at, which may lie on "meta".
        device: one of `DEVICES`.
        precision: of products; by default that of the values ("fp32" for half precision too).

    Raises:
        ValueError: the schedule does not know an operation of the program.
    """
    plan = plan_of(a)
    chosen: Precision = precision or ("fp64" if a.params[0].dtype == torch.float64 else "fp32")
    there = plan.trip(plan.usually) if a.needs else None
    schedules = [plan.there] if there is None else [there.there, there.back]
    return Description(device, chosen, tuple(line for s in schedules for line in _lines(s, device, chosen)))
