"""What of a GPU decides how large the persistent inner loop's blocks are, and how many."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.schedule.devices import Device

__all__ = ["MLP_REGISTERS", "REGISTERS", "Chip"]

_RESERVED = 1024  # bytes of shared memory that the driver takes of every block
_THREADS = 2048  # of a multiprocessor
REGISTERS = {False: 168, True: 240}  # of a thread of the plain and the full kernel: what nvcc says, rounded up
MLP_REGISTERS = (216, 256)  # the same of perceptrons' kernels, with few rows a warp and with many
_REGISTER_FILE = 65536


class Chip(NamedTuple):
    """What of a GPU decides how a program is launched."""

    multiprocessors: int
    block_bytes: int  # of shared memory, the most that one block may ask for
    bytes: int  # of a multiprocessor

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Chip:
        """The GPU that a device is."""
        found: Any = torch.cuda.get_device_properties(device)
        return Chip(
            found.multi_processor_count, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor
        )

    @staticmethod
    def named(device: Device) -> Chip:
        """One of the GPUs whose numbers are known, which need not be there."""
        return Chip(device.processors, device.shared_bytes - _RESERVED, device.shared_bytes)

    def planes(self, tasks: int) -> int:
        """Bytes for a task's planes.

        With a multiprocessor for every task they have all of it. With more tasks a quarter, so that some blocks work
        while others wait at a barrier: three of 128 threads by their registers, more of smaller ones. What does not fit
        goes to the workspace, which stays in the second-level cache. By the model of a phase (a barrier, a chain of
        loads), not measured yet.
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

    def blocks(self, tasks: int, block_bytes: int, threads: int, registers: int) -> int:
        """As many as lie on the chip at once: each takes tasks in turn, and has its own workspace."""
        resident = min(
            self.bytes // (block_bytes + _RESERVED), _THREADS // threads, _REGISTER_FILE // (registers * threads)
        )
        return min(tasks, self.multiprocessors * max(1, resident))
