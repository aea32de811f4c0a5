"""The persistent inner loop on a GPU: launches on the current stream of the tensors' device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.chip import REGISTERS, Chip
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native import engine
from mtml_kernels.native.cuda_device import built_codes, devices, no_code

__all__ = ["DeviceEngine", "DeviceKernels", "backward", "forward"]


class DeviceEngine:
    """Runs programs on the GPU of their tensors, on its current stream.

    chip_of: the numbers of a device; others than its own plan for a GPU that need not be there.
    """

    def __init__(self, chip_of: Callable[[torch.device], Chip] = Chip.of) -> None:
        self._chip_of = chip_of

    def chip_bytes(self, tasks: int, device: torch.device) -> int:
        """How much of the chip the planes of one task may take."""
        return self._chip_of(device).planes(tasks)

    def blocks(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        """How many blocks take the tasks in turn."""
        chip, threads = self._chip_of(device), self.threads(program, tasks, device)
        return chip.blocks(tasks, program.placed.chip_bytes + RING_BYTES, threads, REGISTERS[program.words.full])

    def threads(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        """Of a block."""
        return self._chip_of(device).threads(program.widest, tasks)

    def run(
        self, program: BlockProgram, words: Tensor, workspace: Tensor | None, tensors: Sequence[Tensor | None],
        strides: Sequence[int], tasks: int, blocks: int,
    ) -> None:  # fmt: skip
        """Launches a program on a call's tensors."""
        device, size = words.device, program.dtype.itemsize
        sizes = (
            int(program.dtype == torch.float64), int(program.words.full), blocks, self.threads(program, tasks, device),
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


class DeviceKernels(DeviceEngine):
    """The perceptrons' kernels on the GPU of their tensors, on its current stream."""

    def shapes(self, dtype: torch.dtype) -> Sequence[MlpShape]:
        """The perceptrons that there are kernels for: in float32."""
        return _shapes() if dtype == torch.float32 and built_codes() else ()

    def chip(self, device: torch.device) -> Chip:
        """The numbers of the device."""
        return self._chip_of(device)

    def shared_bytes(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Of a block's memory on the chip."""
        found: int = engine().mlp_shared_bytes(shape, ctypes.addressof(call))
        return found

    def record(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Elements of a step in the history; of a shape in tiles of all of it."""
        found: int = engine().mlp_record(shape, ctypes.addressof(call))
        return found

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """Launches the kernels."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _checked(device, engine().run_mlp, ctypes.addressof(launch), ctypes.addressof(call), stream)


@functools.cache
def _shapes() -> tuple[MlpShape, ...]:
    found: list[MlpShape] = []
    shape = MlpShape()
    while engine().mlp_shape(len(found), ctypes.addressof(shape)):
        found.append(MlpShape.from_buffer_copy(shape))
    return tuple(found)


_persistent = Persistent(DeviceEngine, Perceptrons(DeviceKernels()))
forward, backward = _persistent.forward, _persistent.backward
