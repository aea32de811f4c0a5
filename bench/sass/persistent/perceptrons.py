"""The kernels of perceptrons, compiled and by emulation: `Kernels` of the persistent inner loop."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.sass.chips import CHIPS
from bench.sass.emulation.clocks import Clocks
from bench.sass.persistent.engine import Memory, policy, run, state_of
from bench.sass.persistent.kernel import Code, Kernel, kernel_of
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.device import DeviceKernels
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape

__all__ = ["EmulatedKernels", "RanMlp", "macs_of_perceptron"]


class RanMlp(NamedTuple):
    """A launch: its kernel, threads of a block, blocks that a multiprocessor holds, clocks of its first task."""

    kernel: Kernel
    widths: tuple[int, ...]
    call: MlpCall
    threads: int
    blocks: int
    clocks: Clocks


class EmulatedKernels(DeviceKernels):
    """Launches as if there were `tasks` of them, and runs the first."""

    def __init__(self, chip: str, tasks: int) -> None:
        super().__init__(lambda _: policy(chip))
        self._name, self.tasks = chip, tasks
        self.ran: list[RanMlp] = []

    def chip(self, device: torch.device) -> Chip:
        """The chip; of few multiprocessors where the launch would be of more tasks than there are."""
        found = policy(self._name)
        return found if self.tasks <= found.multiprocessors else found._replace(multiprocessors=1)

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """Runs the first task of a launch."""
        shape, chip = self.shapes(torch.float32)[launch.shape], CHIPS[self._name]
        kernel = kernel_of(code_of(shape, launch.rows), chip.capability)
        tensors = _tensors(call, shape, call.steps * self.record(launch.shape, call))
        memory = Memory(list(tensors.values()))
        moved = MlpCall.from_buffer_copy(call)
        for (name, at), address in zip(tensors, memory.addresses, strict=True):
            if at is None:
                setattr(moved, name, address)
            else:
                getattr(moved, name)[at] = address
        shared = self.shared_bytes(launch.shape, call, torch.float32)
        state = state_of(kernel, shared, _padded(bytes(moved)), memory.words, launch.threads, 0, call.tasks)
        clocks = Clocks(kernel.listing, state, chip)
        run(kernel, state, clocks)
        memory.back()
        resident = chip.resident(kernel.registers, shared, launch.threads // 32)
        kept = MlpCall.from_buffer_copy(call)
        self.ran.append(RanMlp(kernel, _widths(shape), kept, launch.threads, resident, clocks))

    def sum_over_tasks(self, *_: object) -> None:
        """Nothing: of the launch alone is anything said."""


def macs_of_perceptron(widths: Sequence[int], call: MlpCall) -> int:
    """Multiply-adds of a task's products, there and back of second order. The inputs have no tangent."""
    all_layers = sum(i * o for i, o in itertools.pairwise(widths))
    first = widths[0] * widths[1]
    there = 3 * all_layers - first  # forward, of weights, of inputs
    back = 6 * all_layers - 4 * first
    return (call.steps * call.support + call.query) * there + call.steps * call.support * back


def _widths(shape: MlpShape) -> tuple[int, ...]:
    return tuple(shape.widths[: shape.layers + 1])


def _padded(call: bytes) -> bytes:
    return call.ljust(-(-len(call) // 4) * 4, b"\0")


def code_of(shape: MlpShape, rows: int) -> Code:
    """The kernel of a shape with so many rows a warp."""
    widths = ", ".join(map(str, _widths(shape)))
    name = f"mlp_kernel<float, mtmlk::MlpShape<{str(bool(shape.bent)).lower()}, {widths}>, {rows}>"
    return Code("cuda/inner_loop/mlp/kernel.cuh", name, ctypes.sizeof(MlpCall))


def _tensors(call: MlpCall, shape: MlpShape, history: int) -> dict[tuple[str, int | None], Tensor]:
    """What a call's addresses lead to, by field and place in it."""
    widths, t, s, q, k = _widths(shape), call.tasks, call.support, call.query, call.steps
    layers = list(itertools.pairwise(widths))
    weights = sum(o * (i + 1) for i, o in layers)
    sizes: dict[tuple[str, int | None], int] = {}
    for layer, (i, o) in enumerate(layers):
        sizes["theta", 2 * layer], sizes["theta", 2 * layer + 1] = o * i, o
        for tensor in (2 * layer, 2 * layer + 1):
            sizes["rates", tensor] = k if call.rate_stride[tensor] else 1
    sizes |= {("support_x", None): t * s * widths[0], ("support_y", None): t * s * widths[-1]}
    sizes |= {("query_x", None): t * q * widths[0], ("query_y", None): t * q * widths[-1]}
    sizes |= {("loss", None): t, ("output", None): t * q * widths[-1], ("support_losses", None): k * t}
    sizes |= {("parts", None): t * (weights + call.n_rates), ("history", None): history}
    found = {}
    for (name, at), size in sizes.items():
        address = getattr(call, name) if at is None else getattr(call, name)[at]
        if address:
            found[name, at] = torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32)
    return found
