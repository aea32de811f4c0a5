"""The persistent inner loop on a GPU: how large its blocks are, and how many."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native import engine
from mtml_kernels.native.cuda_device import built_codes, devices, no_code

__all__ = ["Chip", "DeviceEngine", "backward", "forward"]

_RESERVED = 1024  # bytes of shared memory that the driver takes of every block
_THREADS = 2048  # of a multiprocessor
_REGISTERS = {False: 168, True: 240}  # of a thread of the plain and the full kernel: what nvcc says, rounded up
_REGISTER_FILE = 65536


class Chip(NamedTuple):
    """What of a GPU decides how a program is launched."""

    multiprocessors: int
    block_bytes: int  # of shared memory, the most that one block may ask for
    bytes: int  # of a multiprocessor

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Chip:
        """A GPU's."""
        found: Any = torch.cuda.get_device_properties(device)
        return Chip(
            found.multi_processor_count, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
        )

    def planes(self, tasks: int) -> int:
        """Bytes for a task's planes.

        With a multiprocessor for every task they have all of it. With more tasks four blocks share one, so that some
        work while others wait at a barrier; what does not fit goes to the workspace, which stays in the second-level
        cache. By the model of a phase (a barrier, a chain of loads), not measured yet.
        """
        if tasks <= self.multiprocessors:
            return self.block_bytes - RING_BYTES
        return min(self.block_bytes, self.bytes // 4 - _RESERVED) - RING_BYTES

    def threads(self, widest: int, tasks: int) -> int:
        """Of a block, a power of two; no bit of a result depends on it.

        One for every two elements of the largest instruction, at most 256 where a block has a multiprocessor to itself
        and its chain of phases is all there is, else 128. By the same model.
        """
        most = 256 if tasks <= self.multiprocessors else 128
        return min(most, max(32, 1 << (max(1, widest // 2) - 1).bit_length()))

    def blocks(self, tasks: int, block_bytes: int, threads: int, full: bool) -> int:
        """As many as lie on the chip at once: each takes tasks in turn, and has its own workspace."""
        resident = min(
            self.bytes // (block_bytes + _RESERVED),
            _THREADS // threads,
            _REGISTER_FILE // (_REGISTERS[full] * threads),
        )
        return min(tasks, self.multiprocessors * max(1, resident))


class DeviceEngine:
    """Runs programs on the GPU of their tensors, on its current stream."""

    def chip_bytes(self, tasks: int, device: torch.device) -> int:
        """How much of the chip the planes of one task may take."""
        return Chip.of(device).planes(tasks)

    def blocks(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        """How many blocks take the tasks in turn."""
        chip, threads = Chip.of(device), self._threads(program, tasks, device)
        return chip.blocks(tasks, program.placed.chip_bytes + RING_BYTES, threads, program.words.full)

    @staticmethod
    def _threads(program: BlockProgram, tasks: int, device: torch.device) -> int:
        return Chip.of(device).threads(program.widest, tasks)

    def run(
        self, program: BlockProgram, words: Tensor, workspace: Tensor | None, tensors: Sequence[Tensor | None],
        strides: Sequence[int], tasks: int, blocks: int,
    ) -> None:  # fmt: skip
        """Launches a program on a call's tensors."""
        device, size = words.device, program.dtype.itemsize
        sizes = (
            int(program.dtype == torch.float64), int(program.words.full), blocks, self._threads(program, tasks, device),
            program.words.first, -(-program.placed.chip_bytes // size), program.placed.workspace_bytes // size,
        )  # fmt: skip
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            at = 0 if workspace is None else workspace.data_ptr()
            _checked(device, engine().run_schedule, sizes, tasks, words.data_ptr(), at, addresses, strides, stream)

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        """Each result = its elements, from `begins` on, of sum over tasks of scale [T] parts [T, P], in their order."""
        tasks, elements = parts.shape
        with torch.cuda.device(parts.device):
            stream = torch.cuda.current_stream(parts.device).cuda_stream
            double, at = int(parts.dtype == torch.float64), 0 if scale is None else scale.data_ptr()
            where = [0 if t is None else t.data_ptr() for t in results]
            arguments = (double, tasks, parts.data_ptr(), at, elements, where, begins, stream)
            _checked(parts.device, engine().sum_over_tasks, *arguments)


def _checked(device: torch.device, call: object, *arguments: object) -> None:
    """Says what to build where there is no code for the device."""
    assert callable(call)
    try:
        call(*arguments)
    except engine().NoDeviceCode as error:
        index = device.index or 0
        raise BackendUnavailable(no_code(index, devices()[index], built_codes(), str(error))) from error


_persistent = Persistent(DeviceEngine)
forward, backward = _persistent.forward, _persistent.backward
