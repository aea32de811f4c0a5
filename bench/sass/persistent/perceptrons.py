"""The kernels of perceptrons, compiled and by emulation: `Kernels` of the persistent inner loop."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.sass.chips import CHIPS
from bench.sass.emulation.clocks import Clocks
from bench.sass.persistent.engine import Memory, policy, run, state_of
from bench.sass.persistent.kernel import Code, Kernel, kernel_of
from bench.sass.persistent.tiles import RanTiles, TileLaunch
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.device import DeviceKernels
from mtml_kernels.cuda.inner_loop.mlp import tile_blocks
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.cuda.inner_loop.predicted import SUM_THREADS, sum_blocks

__all__ = ["EmulatedKernels", "RanMlp", "macs_of_perceptron"]


class RanMlp(NamedTuple):
    """A launch: its kernel, threads of a block, blocks that a multiprocessor holds, clocks of its first task."""

    kernel: Kernel
    widths: tuple[int, ...]
    call: MlpCall
    threads: int
    blocks: int
    clocks: Clocks
    rows: int  # of a warp


class _One(NamedTuple):
    """A launch of which a block is run."""

    code: Code
    shared: int
    threads: int
    blocks: int
    parameters: bytes


class EmulatedKernels(DeviceKernels):
    """Launches as if there were `tasks` of them, and runs the first. tf32: of the kernels on matrix units."""

    def __init__(self, chip: str, tasks: int, tf32: bool = False) -> None:
        super().__init__(lambda _: policy(chip), tf32)
        self._name, self.tasks = chip, tasks
        self.ran: list[RanMlp | RanTiles] = []

    def chip(self, device: torch.device) -> Chip:
        """The chip; of few multiprocessors where the launch would be of more tasks than there are."""
        found = policy(self._name)
        return found if self.tasks <= found.multiprocessors else found._replace(multiprocessors=1)

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """Runs the first task of a launch; of launches of tiles, each kind's first block."""
        shape = self.shapes(torch.float32)[launch.shape]
        record = self.record(launch.shape, call, torch.float32)
        tensors = _tensors(call, shape, record if shape.tile else call.steps * record)
        memory = Memory(list(tensors.values()))
        moved = MlpCall.from_buffer_copy(call)
        for (name, at), address in zip(tensors, memory.addresses, strict=True):
            if at is None:
                setattr(moved, name, address)
            else:
                getattr(moved, name)[at] = address
        run_launch = self._run_tiles if shape.tile else self._run_whole
        self.ran.append(run_launch(launch, shape, moved, memory))
        memory.back()

    def _run_whole(self, launch: MlpLaunch, shape: MlpShape, call: MlpCall, memory: Memory) -> RanMlp:
        shared = self.shared_bytes(launch.shape, call, torch.float32)
        one = _One(code_of(shape, launch.rows), shared, launch.threads, call.tasks, bytes(call))
        kernel, resident, clocks = self._run_block(one, memory)
        return RanMlp(kernel, _widths(shape), call, launch.threads, resident, clocks, launch.rows)

    def _run_tiles(self, launch: MlpLaunch, shape: MlpShape, call: MlpCall, memory: Memory) -> RanTiles:
        """The launches of `tasks` tasks, of which the call has fewer: so many blocks of a task."""
        steps, chip = call.steps, policy(self._name)
        there = MlpCall.from_buffer_copy(call)
        there.wants_gradient = 0  # whose blocks have the memory of the way there
        shared = [self.shared_bytes(launch.shape, each, torch.float32) for each in (there, call)]
        tiles = [-(-samples // shape.tile) for samples in (call.support, call.query)]
        back = tile_blocks(chip, self.tasks, tiles[0], shared[1])
        sums = sum_blocks(_widths(shape))
        kinds = [  # name, how often, k, whether back (None: sums), blocks of a task
            ("tiles there, from the caller's parameters", min(1, steps), 0, False, tiles[0]),
            ("tiles there", max(0, steps - 1), 1, False, tiles[0]),
            ("sums there", steps, 0, None, sums),
            ("tiles of the query set", 1, steps, False, tiles[1]),
            ("sums of the query set", 1, steps, None, sums),
        ]
        if call.wants_gradient and not call.first_order:
            kinds += [("tiles back", steps, 0, True, back), ("sums back", steps, 0, None, sums)]
        found = []
        for name, times, k, way, blocks in kinds:
            parameters = struct.pack("<i", k) if way is not None else struct.pack("<ii", k, name == "sums back")
            own = 0 if way is None else shared[way]
            threads = SUM_THREADS if way is None else (launch.threads, launch.back_threads)[way]
            one = _One(tile_code(shape, way), own, threads, blocks * call.tasks, bytes(call) + parameters)
            if times:
                kernel, resident, clocks = self._run_block(one, memory)
                found.append(TileLaunch(name, times, kernel, threads, blocks * self.tasks, resident, clocks))
        return RanTiles(_widths(shape), shape.tile, call, tuple(found))

    def _run_block(self, one: _One, memory: Memory) -> tuple[Kernel, int, Clocks]:
        """The first block of a launch, and how many a multiprocessor holds."""
        chip = CHIPS[self._name]
        kernel = kernel_of(one.code, chip.capability)
        state = state_of(kernel, one.shared, _padded(one.parameters), memory.words, one.threads, 0, one.blocks)
        clocks = Clocks(kernel.listing, state, chip)
        run(kernel, state, clocks)
        return kernel, chip.resident(kernel.registers, one.shared, one.threads // 32), clocks

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


def tile_code(shape: MlpShape, back: bool | None) -> Code:
    """The kernel of a shape's tiles, there or back; None: the one that adds up what they leave."""
    widths, bent = ", ".join(map(str, _widths(shape))), str(bool(shape.bent)).lower()
    own = f"mtmlk::MlpShape<{bent}, {widths}>"
    if shape.terms and back is not None:
        own = f"mtmlk::InTf32<{own}, {shape.terms}>"
    of = f"float, {own}, {shape.tile}"
    folder, size = "cuda/inner_loop/mlp/", ctypes.sizeof(MlpCall)
    if back is None:
        return Code(f"{folder}tile_sums.cuh", f"mlp_sum_kernel<{of}>", size + 8)
    name = f"mlp_tile_kernel<{of}, {shape.rows[back]}, {str(back).lower()}>"
    return Code(f"{folder}tile_kernel.cuh", name, size + 4)


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
