"""``python -m bench host WORKLOAD --backend cuda``: what a meta-step of backend ``cuda`` costs the host.

The kernels are replaced by nothing, the tensors lie on the CPU, and all else is what runs on a GPU: checks, autograd,
room for results, the calls of the native functions. Beside it, in turn, a ``torch.autograd.Function`` of as many inputs
that does nothing: what PyTorch itself takes. Not in it: what CUDA's allocator takes beyond malloc, and the launches.
Times are the thread's own: one thread does all of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.measure import timing
from bench.measure.host import HostTimes, one_thread, runs_of
from bench.providers import Unavailable
from bench.workloads import select
from mtml_kernels import native
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.device import DeviceEngine
from mtml_kernels.cuda.inner_loop.lane import Lane
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.native.tensors import read_call
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.registry import Backend
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop_lane import FastLane

__all__ = ["measure", "without_kernels"]

GPU = "h200"  # whose numbers decide about blocks and threads


class NoKernels(DeviceEngine):
    """Launches nothing, on a device that need not be there."""

    def __init__(self) -> None:
        super().__init__(lambda device: Chip.named(DEVICES[GPU]), lambda: 0)

    def functions(self) -> tuple[int, int]:
        """Native functions that do nothing."""
        found: tuple[int, int] = native.engine().no_launches()
        return found


class NoPerceptrons(NoKernels):
    """The kernels that perceptrons of known widths have, without them."""

    def shapes(self, dtype: torch.dtype) -> list[MlpShape]:
        """Those of the sinusoids' network."""
        shape = MlpShape(layers=3, bent=0)
        shape.widths[:4], shape.rows[:] = (1, 40, 40, 1), (2, 10)
        return [shape] if dtype == torch.float32 else []

    def chip(self, device: torch.device) -> Chip:
        """The numbers of the device."""
        return self._chip_of(device)

    def shared_bytes(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Of a block's memory on the chip."""
        return 64 * 1024

    def record(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Elements of a step in the history."""
        return 4096

    def entry(self) -> int:
        """A native function that does nothing."""
        found: int = native.engine().no_mlp_launch()
        return found

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """The long way, which nothing here takes."""
        raise NotImplementedError


@contextmanager
def without_kernels() -> Iterator[None]:
    """``cuda`` is a backend for CPU tensors whose kernels do nothing."""
    before, persistent = BACKENDS.named("cuda"), Persistent(NoKernels, Perceptrons(NoPerceptrons()))
    lane = FastLane(read_call, Lane(persistent, NoKernels).make)
    BACKENDS.register(Backend("cuda", native.availability, persistent.forward, persistent.backward, fast_lane=lane))
    try:
        yield
    finally:
        BACKENDS.register(before)


def measure(workload: str, seconds: float = 2.0) -> HostTimes:
    """Host times of a workload's meta-step, forward and backward.

    Raises:
        Unavailable: the compiled module cannot run here, or does not read this PyTorch's tensors.
    """
    if (why := native.availability()) is not None:
        raise Unavailable(why)
    if read_call(torch.ones(1)) is None:
        raise Unavailable("tensors are read by PyTorch's DLPack exchange table, which this version does not have")
    (w,) = select([workload])
    with one_thread(), without_kernels():
        runs = runs_of(w, "cuda")
        for run in (*runs.values(), *runs.values()):
            run()  # the first call traces, plans and remembers
        return HostTimes(**timing.interleave(runs, seconds, clock=time.thread_time))
