"""The persistent inner loop on a GPU: launches on the current stream of the tensors' device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtml_kernels.cuda.backends import FORMS
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.chip import REGISTERS, Chip
from mtml_kernels.cuda.inner_loop.lane import Lane, Native
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native import engine
from mtml_kernels.native.cuda_device import built_codes, devices, no_code

__all__ = ["DeviceEngine", "DeviceKernels", "of_form"]


class DeviceEngine:
    """Runs programs on the GPU of their tensors, on its current stream.

    chip_of: the numbers of a device; others than its own plan for a GPU that need not be there.
    current: the index of the current device.
    """

    def __init__(
        self, chip_of: Callable[[torch.device], Chip] = Chip.of, current: Callable[[], int] = torch.cuda.current_device
    ) -> None:
        self._chip_of, self._current = chip_of, current

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

    def sizes(self, program: BlockProgram, tasks: int, blocks: int, device: torch.device) -> tuple[int, ...]:
        """Of a launch: dtype, full, blocks, threads, first_words, chip_elements, workspace_elements."""
        size = program.dtype.itemsize
        return (
            int(program.dtype == torch.float64), int(program.words.full), blocks, self.threads(program, tasks, device),
            program.words.first, -(-program.placed.chip_bytes // size), program.placed.workspace_bytes // size,
        )  # fmt: skip

    def functions(self) -> tuple[int, int]:
        """Addresses of `mtmlk_run_schedule` and `mtmlk_sum_over_tasks`."""
        found: tuple[int, int] = engine().launches()
        return found

    def calling(self, native: Native, device: torch.device) -> Native:
        """The same with the device as the current one, and what to build where there is no code for it."""
        index, current = device.index or 0, self._current

        def call(*arguments: object) -> object:
            if current() != index:
                with torch.cuda.device(index):
                    return call(*arguments)
            try:
                return native(*arguments)
            except engine().NoDeviceCode as error:
                raise _unavailable(error, device) from error

        return call

    def run(
        self, program: BlockProgram, words: Tensor, workspace: Tensor | None, tensors: Sequence[Tensor | None],
        strides: Sequence[int], tasks: int, blocks: int,
    ) -> None:  # fmt: skip
        """Launches a program on a call's tensors."""
        device = words.device
        sizes = self.sizes(program, tasks, blocks, device)
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


def _checked(device: torch.device, call: Native, *arguments: object) -> None:
    """Says what to build where there is no code for the device."""
    try:
        call(*arguments)
    except engine().NoDeviceCode as error:
        raise _unavailable(error, device) from error


def _unavailable(error: Exception, device: torch.device) -> BackendUnavailable:
    """What to build where there is no code for the device."""
    index = device.index or 0
    return BackendUnavailable(no_code(index, devices()[index], built_codes(), str(error)))


class DeviceKernels(DeviceEngine):
    """The perceptrons' kernels on the GPU of their tensors, on its current stream.

    tf32: those on matrix units.
    """

    def __init__(self, chip_of: Callable[[torch.device], Chip] = Chip.of, tf32: bool = False) -> None:
        super().__init__(chip_of)
        self._tf32 = tf32

    def _native(self, name: str) -> Any:
        """An entry, of those on matrix units that of the same name behind `tf32_`."""
        return getattr(engine(), f"tf32_{name}" if self._tf32 else name)

    def shapes(self, dtype: torch.dtype) -> Sequence[MlpShape]:
        """The perceptrons that there are kernels for: in float32."""
        return _shapes(self._native("mlp_shape")) if dtype == torch.float32 and built_codes() else ()

    def chip(self, device: torch.device) -> Chip:
        """The numbers of the device."""
        return self._chip_of(device)

    def shared_bytes(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Of a block's memory on the chip."""
        found: int = self._native("mlp_shared_bytes")(shape, ctypes.addressof(call))
        return found

    def record(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        """Elements of a step in the history; of a shape in tiles of all of it."""
        found: int = self._native("mlp_record")(shape, ctypes.addressof(call))
        return found

    def entry(self) -> int:
        """Address of `mtmlk_run_mlp`, or of `mtmlk_run_tf32_mlp`."""
        found: int = self._native("mlp_launch")()
        return found

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        """Launches the kernels."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _checked(device, self._native("run_mlp"), ctypes.addressof(launch), ctypes.addressof(call), stream)


@functools.cache
def _shapes(entry: Native) -> tuple[MlpShape, ...]:
    found: list[MlpShape] = []
    shape = MlpShape()
    while entry(len(found), ctypes.addressof(shape)):
        found.append(MlpShape.from_buffer_copy(shape))
    return tuple(found)


@functools.cache
def of_form(name: str) -> tuple[Persistent, Lane]:
    """The backend `cuda` or another of its forms, and its fast lane."""
    terms = FORMS[name]
    perceptrons = Perceptrons(DeviceKernels(tf32=terms > 0), terms)
    persistent = Persistent(DeviceEngine, perceptrons, name if terms else None)
    return persistent, Lane(persistent, DeviceEngine)
