"""An engine of the persistent inner loop: its compiled kernel by emulation, and the clocks of the first task."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.sass.chips import CHIPS, RESERVED_SHARED
from bench.sass.emulation.block import Block
from bench.sass.emulation.clocks import Clocks
from bench.sass.emulation.state import GLOBAL, LANES, WINDOW, Array, State
from bench.sass.persistent.kernel import INTERPRETERS, Kernel, kernel_of
from mtml_kernels.cuda.inner_loop.chip import REGISTERS, Chip
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.cuda.inner_loop.words import RING_BYTES

__all__ = ["Emulated", "Memory", "Ran", "policy", "run", "state_of"]

_ALIGNMENT = 64  # words between tensors


class Ran(NamedTuple):
    """A launch: its program, threads of a block, blocks that a multiprocessor holds, clocks of its first task."""

    program: BlockProgram
    kernel: Kernel
    threads: int
    blocks: int
    clocks: Clocks


def policy(name: str) -> Chip:
    """What decides on the launch, of a chip that need not be there."""
    chip = CHIPS[name]
    return Chip(chip.device.processors, chip.shared - RESERVED_SHARED, chip.shared)


class Emulated:
    """Launches as if there were `tasks` of them; `all_tasks`: runs every task that is there, else the first alone."""

    def __init__(self, chip: str, tasks: int, all_tasks: bool = False) -> None:
        self._name, self._tasks, self._all = chip, tasks, all_tasks
        self._policy = policy(chip)
        self.ran: list[Ran] = []

    def chip_bytes(self, tasks: int, device: torch.device) -> int:
        """How much of the chip the planes of one task may take."""
        return self._policy.planes(self._tasks)

    def blocks(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        """A block a task."""
        return tasks

    def run(
        self, program: BlockProgram, words: Tensor, workspace: Tensor | None, tensors: Sequence[Tensor | None],
        strides: Sequence[int], tasks: int, blocks: int,
    ) -> None:  # fmt: skip
        """Launches a program on a call's tensors."""
        kernel = kernel_of(INTERPRETERS[program.words.full], CHIPS[self._name].capability)
        threads = self._policy.threads(program.widest, self._tasks)
        memory = Memory([words, workspace, *tensors])
        call = _call(program, memory.addresses, strides, tasks)
        for block in range(tasks if self._all else 1):
            shared = RING_BYTES + program.placed.chip_bytes
            state = state_of(kernel, shared, call, memory.words, threads, block, tasks)
            clocks = Clocks(kernel.listing, state, CHIPS[self._name])
            run(kernel, state, clocks)
            if block == 0:
                block_bytes = program.placed.chip_bytes + RING_BYTES
                resident = self._policy.blocks(1 << 30, block_bytes, threads, REGISTERS[program.words.full])
                self.ran.append(Ran(program, kernel, threads, resident // self._policy.multiprocessors, clocks))
        memory.back()

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        """Each result = its elements, from `begins` on, of sum over tasks of scale [T] parts [T, P]."""
        total = (parts if scale is None else parts * scale[:, None]).sum(0)
        for result, begin in zip(results, begins, strict=True):
            if result is not None:
                result.copy_(total[begin : begin + result.numel()].view(result.shape))


class Memory:
    """Tensors one after the other in one global memory."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = tensors
        self.addresses: list[int] = []
        size = _ALIGNMENT
        for tensor in tensors:
            self.addresses.append(0 if tensor is None else GLOBAL + 4 * size)
            if tensor is not None:
                size += -(-tensor.numel() * tensor.element_size() // (4 * _ALIGNMENT)) * _ALIGNMENT + _ALIGNMENT
        self.words: Array = np.zeros(size, np.uint32)
        for tensor, place in zip(tensors, self.addresses, strict=True):
            if tensor is not None:
                self._of(tensor, place)[:] = tensor.contiguous().view(-1).numpy().view(np.uint32)

    def _of(self, tensor: Tensor, place: int) -> Array:
        first = (place - GLOBAL) // 4
        return self.words[first : first + tensor.numel() * tensor.element_size() // 4]

    def back(self) -> None:
        """What the kernel has written, in the tensors."""
        for tensor, place in zip(self._tensors, self.addresses, strict=True):
            if tensor is not None and tensor.is_contiguous():
                tensor.view(-1).numpy().view(np.uint32)[:] = self._of(tensor, place)


def _call(program: BlockProgram, addresses: Sequence[int], strides: Sequence[int], tasks: int) -> bytes:
    """`ScheduleCall` of csrc/cuda/inner_loop/program.h."""
    size, placed = program.dtype.itemsize, program.placed
    words, workspace, *tensors = addresses
    made = struct.pack("<QQq", words, workspace, placed.workspace_bytes // size)
    made += struct.pack("<iiixxxx", program.words.first, -(-placed.chip_bytes // size), tasks)
    made += b"".join(struct.pack("<Qq", at, stride) for at, stride in zip(tensors, strides, strict=True))
    return made.ljust(INTERPRETERS[False].parameters, b"\0")


def state_of(
    kernel: Kernel, shared_bytes: int, call: bytes, words: Array, threads: int, block: int, blocks: int
) -> State:
    """A block of a launch with these parameters, before its first instruction."""
    bank = np.zeros((kernel.parameters + len(call)) // 4, np.uint32)
    bank[0], bank[3] = threads, blocks
    bank[6:8] = 0, WINDOW  # where generic addresses of shared memory begin, on chips before the H100
    bank[kernel.parameters // 4 :] = np.frombuffer(call, np.uint32)
    shared = kernel.reserved + shared_bytes
    nowhere = np.zeros(2, np.uint32)  # the table of 2 / pi, which only sines of huge arguments read
    return State(threads // LANES, {0: bank, 2: kernel.tables, 4: nowhere}, words, shared // 4, block)


def run(kernel: Kernel, state: State, clocks: Clocks) -> None:
    """A block to its end, barrier by barrier."""
    block, passed = Block(kernel.listing, state), 0

    def observe(at: int, lanes: Array) -> None:
        nonlocal passed
        if block.passed != passed:
            passed = block.passed
            clocks.barrier()
        clocks(at, lanes)

    block.run(observe)
    clocks.barrier()
