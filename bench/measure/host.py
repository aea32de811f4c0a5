"""``python -m bench host``: host time of one meta-step, all of forward + backward but what the CPU engine computes.

The engine's passes are replaced by nothing, and all else is what runs: Python, PyTorch's autograd, the checks, and the
bindings, which read tensors, make room and hand out results. Beside it, in turn, a ``torch.autograd.Function`` of as
many inputs and results that does nothing: what PyTorch itself takes. One thread, by its own time, so that other work on
the machine counts as little as it can.

The same with the engine, less the time inside it, is more: what Python and PyTorch read has left the caches meanwhile.
That is so for the Function too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import timing
from bench.providers import Unavailable
from bench.workloads import Workload, make_data, make_network, select
from mtml_kernels.functional import inner_loop
from mtml_kernels.program import trace

__all__ = [
    "HostTimes",
    "host_clock",
    "measure",
    "measure_between",
    "native_clock",
    "nothing_like",
    "one_thread",
    "runs_of",
]


@dataclass(frozen=True)
class HostTimes:
    """Of one meta-step: the function, the module above it, and a Function that does nothing."""

    function: timing.Timing
    module: timing.Timing
    nothing: timing.Timing


def native_clock() -> Callable[[], float]:
    """The compiled module's cumulative seconds. Raises Unavailable where it is not built or does not count."""
    try:
        from mtml_kernels import native

        clock: Callable[[], float] = native.native_seconds
        clock()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Unavailable(
            f"no clock inside native code ({error}): build the compiled module with `pip install -e .`"
        ) from error
    return clock


@contextmanager
def _set(switch: str) -> Iterator[None]:
    """A switch of the compiled module, on."""
    from mtml_kernels.native import engine

    turn = getattr(engine(), switch)
    turn(True)
    try:
        yield
    finally:
        turn(False)


def without_engine() -> AbstractContextManager[None]:
    """The engine's plans do nothing: results are whatever lies in memory."""
    return _set("let_plans_rest")


@contextmanager
def host_clock() -> Iterator[Callable[[], float]]:
    """A clock of this thread's own time that stands still inside native code."""
    inside = native_clock()
    with _set("native_thread_time"):
        yield lambda: time.thread_time() - inside()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def runs_of(w: Workload, backend: str) -> dict[str, Callable[[], Any]]:
    """Meta-steps by a backend, forward and backward, and the Function that does nothing."""
    import mtml

    net, (sx, sy, qx, qy) = make_network(w), make_data(w)
    named = dict(net.named_parameters())
    params, seed = list(named.values()), torch.full((w.tasks,), 1 / w.tasks)
    program = trace(net, [w.x])
    maml = mtml.MAML(net, lr=w.lr, steps=w.steps, loss=w.loss, backend=backend)
    options: dict[str, Any] = {"steps": w.steps, "loss": w.loss, "query_x": qx, "query_y": qy, "keep": "none"}
    options["backend"] = backend
    first = inner_loop(program, named, sx, sy, w.lr, **options)
    others, results = [sx, sy, qx, qy, torch.full((1,), w.lr)], [t.detach().clone() for t in first[:3]]
    nothing = nothing_like(params, others, results)

    def back(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, params, seed)

    return {
        "function": lambda: back(inner_loop(program, named, sx, sy, w.lr, **options).loss),
        "module": lambda: back(maml.meta_loss(sx, sy, qx, qy)),
        "nothing": lambda: back(nothing.apply(*params, *others)[0]),
    }


def _warm_runs(workload: str) -> dict[str, Callable[[], Any]]:
    (w,) = select([workload])
    runs = runs_of(w, "cpu")
    for run in (*runs.values(), *runs.values()):
        run()  # the first call traces, plans and remembers
    return runs


def measure(workload: str, seconds: float = 2.0) -> HostTimes:
    """Host times of a workload's meta-step without what the CPU engine computes.

    Raises:
        Unavailable: the compiled module is not built.
    """
    native_clock()
    with one_thread(), without_engine():
        return HostTimes(**timing.interleave(_warm_runs(workload), seconds, clock=time.thread_time))


def measure_between(workload: str, seconds: float = 2.0) -> timing.Timing:
    """Host time of the module's meta-step with the engine, less the time inside it. Raises as `measure`."""
    with one_thread(), host_clock() as clock:
        runs = {"module": _warm_runs(workload)["module"]}
        return timing.interleave(runs, seconds, clock=clock)["module"]
