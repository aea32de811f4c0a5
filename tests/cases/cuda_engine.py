"""The persistent inner loop on the CPU: its kernel compiled by a C++ compiler, as a backend of `inner_loop` for tests.

    with registered(HostEngine(threads=64, order=3)):
        case.call(CUDA_HOST)

As a plugin (`run_engine_tests`) the module registers it for every test.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.cuda_host import build
from torch import Tensor

from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.lane import Lane
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.native.tensors import read_call
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.registry import Backend
from mtml_kernels.schema.inner_loop_lane import FastLane

CUDA_HOST = "cuda-host"
TESTS = Path(__file__).parents[1]
API = TESTS / "cuda" / "inner_loop" / "engine.cu"
CHIP = 200 * 1024  # bytes
DTYPES = {torch.float32: 0, torch.float64: 1}  # MtmlkDtype
FUNCTIONS = ("run_schedule", "sum_over_tasks")


class Schedule(ctypes.Structure):
    """MtmlkSchedule of csrc/include/mtml/cuda_inner_loop.h."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("full", ctypes.c_int32),
        ("tasks", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("program", ctypes.c_void_p),
        ("first_words", ctypes.c_int32),
        ("chip_elements", ctypes.c_int32),
        ("workspace_elements", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        ("n_tensors", ctypes.c_int32),
        ("tensors", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
    )


class Sums(ctypes.Structure):
    """MtmlkTaskSums."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("tasks", ctypes.c_int32),
        ("parts", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("n_results", ctypes.c_int32),
        ("results", ctypes.c_void_p),
        ("begins", ctypes.c_void_p),
    )


class Reason(ctypes.Structure):
    """MtmlkReason of csrc/include/mtml/abi.h."""

    _fields_ = (("text", ctypes.c_char * 240),)


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(API, "plain", "-shared")))


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*map(address, tensors))


def numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


@dataclass
class HostEngine:
    """An engine of `Persistent` whose device is the CPU."""

    threads: int = 32
    chip: int = CHIP  # bytes
    most_blocks: int = 2
    order: int | None = None  # of the threads, see cases.cuda_host.ORDERS; None: as the environment says
    full: bool = False  # the kernel with all instructions also where the plain one has those of the program

    def chip_bytes(self, tasks: int, device: torch.device) -> int:
        return self.chip

    def blocks(self, program: BlockProgram, tasks: int, device: torch.device) -> int:
        return min(tasks, self.most_blocks)

    def run(
        self,
        program: BlockProgram,
        words: Tensor,
        workspace: Tensor | None,
        tensors: Sequence[Tensor | None],
        strides: Sequence[int],
        tasks: int,
        blocks: int,
    ) -> None:
        where, steps = addresses(tensors), numbers(strides)
        chip, each = elements_of(program)
        schedule = Schedule(
            dtype=DTYPES[program.dtype],
            full=self.full or program.words.full,
            tasks=tasks,
            blocks=blocks,
            threads=self.threads,
            program=address(words),
            first_words=program.words.first,
            chip_elements=chip,
            workspace_elements=each,
            workspace=address(workspace),
            n_tensors=len(tensors),
            tensors=ctypes.addressof(where),
            strides=ctypes.addressof(steps),
        )
        self.call("mtmlk_run_schedule", schedule)

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        assert parts.is_contiguous() and (scale is None or scale.is_contiguous())
        where, first = addresses(results), numbers(begins)
        sums = Sums(
            dtype=DTYPES[parts.dtype],
            tasks=parts.shape[0],
            parts=address(parts),
            scale=address(scale),
            elements=parts.shape[1],
            n_results=len(results),
            results=ctypes.addressof(where),
            begins=ctypes.addressof(first),
        )
        self.call("mtmlk_sum_over_tasks", sums)

    def sizes(self, program: BlockProgram, tasks: int, blocks: int, device: torch.device) -> tuple[int, ...]:
        full = self.full or program.words.full
        return DTYPES[program.dtype], full, blocks, self.threads, program.words.first, *elements_of(program)

    def functions(self) -> tuple[int, int]:
        run, add_up = (ctypes.cast(getattr(library(), f"mtmlk_{name}"), ctypes.c_void_p).value for name in FUNCTIONS)
        assert run is not None and add_up is not None
        return run, add_up

    def calling(self, native: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with in_order(self.order), poisoned_memory():
                return native(*arguments)

        return call

    def call(self, function: str, given: ctypes.Structure) -> None:
        reason = Reason()
        with in_order(self.order):
            status = getattr(library(), function)(ctypes.byref(given), None, ctypes.byref(reason))
        if status != 0:
            raise RuntimeError(reason.text.decode())


def elements_of(program: BlockProgram) -> tuple[int, int]:
    """Of a block: on the chip and in the workspace."""
    size = program.dtype.itemsize
    return -(-program.placed.chip_bytes // size), program.placed.workspace_bytes // size


@contextmanager
def in_order(order: int | None) -> Iterator[None]:
    """Launches inside run their threads so."""
    before = os.environ.get("MTML_HOST_ORDER")
    if order is not None:
        os.environ["MTML_HOST_ORDER"] = str(order)
    try:
        yield
    finally:
        if order is not None:
            del os.environ["MTML_HOST_ORDER"]
            os.environ.update({} if before is None else {"MTML_HOST_ORDER": before})


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """PyTorch fills new memory with NaN inside, also what native code asks it for."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def backend(
    engine: HostEngine, perceptrons: Perceptrons | None = None, lane: bool = True, form: str | None = None
) -> Backend:
    """`lane`: plain calls take the fast lane, as on a GPU. `form`: as of `Persistent`."""
    persistent = Persistent(lambda: engine, perceptrons, form)
    fast_lane = FastLane(read_call, Lane(persistent, lambda: engine).make) if lane else None

    def supports(device: str, dtype: torch.dtype) -> str | None:
        return None if device == "cpu" and dtype in DTYPES else f"no {dtype} on {device}"

    forward, backward = persistent.forward, persistent.backward
    return Backend(CUDA_HOST, lambda: None, forward, backward, supports, fast_lane=fast_lane)


@contextmanager
def registered(engine: HostEngine | None = None, lane: bool = True) -> Iterator[str]:
    """`cuda-host` by an engine is a backend inside."""
    BACKENDS.register(backend(engine or HostEngine(), lane=lane))
    try:
        yield CUDA_HOST
    finally:
        BACKENDS.unregister(CUDA_HOST)


def pytest_configure(config: Any) -> None:
    """As a plugin."""
    BACKENDS.register(backend(HostEngine()))


def run_engine_tests(name: str, expression: str) -> None:
    """Runs a file of tests/ with this backend for the compiled engine; ends the process where a test fails."""
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", expression]
    if code := pytest.main([str(TESTS / name), *options], plugins=[sys.modules[__name__]]):
        sys.exit(code)
