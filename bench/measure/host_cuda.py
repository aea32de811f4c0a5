"""``python -m bench host WORKLOAD --backend cuda``: what a meta-step of backend ``cuda`` costs the host.

The kernels are replaced by nothing, the tensors lie on the CPU, and all else is what runs on a GPU: checks, autograd,
room for results, the calls of the native functions. Beside it, in turn, a ``torch.autograd.Function`` of as many inputs
that does nothing: what PyTorch itself takes. Not in it: what CUDA's allocator takes beyond malloc, and the launches.
Times are the thread's own: one thread does all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import timing
from bench.providers import Unavailable
from bench.workloads import Workload, make_data, make_network, select
from mtml_kernels import native
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.device import DeviceEngine
from mtml_kernels.cuda.inner_loop.lane import Lane
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.functional import inner_loop
from mtml_kernels.native.tensors import read_call
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import trace
from mtml_kernels.registry import Backend
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop_lane import FastLane

__all__ = ["HostTimes", "measure", "nothing_like", "runs_of", "without_kernels"]

GPU = "h200"  # whose numbers decide about blocks and threads


@dataclass(frozen=True)
class HostTimes:
    """Of one meta-step: the function, the module above it, and a Function that does nothing."""

    function: timing.Timing
    module: timing.Timing
    nothing: timing.Timing


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


def nothing_like(
    params: Sequence[Tensor], others: Sequence[Tensor], results: Sequence[Tensor]
) -> type[torch.autograd.Function]:
    """A Function with these inputs and results that only saves what it is given."""
    grads = (*(torch.zeros_like(p) for p in params), *[None] * len(others))

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            _ = ctx.saved_tensors
            return grads

    return Nothing


def runs_of(w: Workload) -> dict[str, Callable[[], Any]]:
    """Meta-steps by backend ``cuda``, forward and backward, and the Function that does nothing."""
    import mtml

    net, (sx, sy, qx, qy) = make_network(w), make_data(w)
    named = dict(net.named_parameters())
    params, seed = list(named.values()), torch.full((w.tasks,), 1 / w.tasks)
    program = trace(net, [w.x])
    maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss, backend="cuda")
    options: dict[str, Any] = {"steps": w.steps, "loss": w.loss, "query_x": qx, "query_y": qy, "keep": "none"}
    first = inner_loop(program, named, sx, sy, w.lr, backend="cuda", **options)
    others, results = [sx, sy, qx, qy, torch.full((1,), w.lr)], [t.detach().clone() for t in first[:3]]
    nothing = nothing_like(params, others, results)

    def back(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, params, seed)

    return {
        "function": lambda: back(inner_loop(program, named, sx, sy, w.lr, backend="cuda", **options).loss),
        "module": lambda: back(maml.meta_loss(sx, sy, qx, qy)),
        "nothing": lambda: back(nothing.apply(*params, *others)[0]),
    }


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_kernels():
            runs = runs_of(w)
            for run in (*runs.values(), *runs.values()):
                run()  # the first call traces, plans and remembers
            found = timing.interleave(runs, seconds, clock=time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return HostTimes(**found)
