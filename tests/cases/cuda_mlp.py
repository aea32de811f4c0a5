"""The perceptrons' kernels on the CPU: compiled by a C++ compiler, as `Kernels` of the backend `cuda-host`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from cases.cuda_engine import CUDA_HOST, TESTS, HostEngine, Reason, backend, in_order
from cases.cuda_host import build
from cases.engine import draft_case, mlp
from torch import Tensor

from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.mlp import Perceptrons
from mtml_kernels.cuda.inner_loop.mlp_call import MlpCall, MlpLaunch, MlpShape
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import Act
from mtml_kernels.schema.inner_loop import NEED_LR, NEED_PARAMS, InnerLoopArgs

KB = 1024
CONSTANTS = {Act.LEAKY_RELU: (0.2, 0.0), Act.SIN: (1.7, 0.0), Act.SOFTPLUS: (1.3, 4.0)}
Results = tuple[list[Tensor], list[Tensor]]
ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)  # mtmlk_run_mlp


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(build(TESTS / "cuda" / "inner_loop" / "mlp.cu", "plain", "-shared")))
    sizes = ("mtmlk_mlp_shared_bytes", "mlp_shared_bytes_in_double", "mtmlk_mlp_record", "mlp_record_in_double")
    for name in (*sizes, "mlp_call_bytes"):
        getattr(found, name).restype = ctypes.c_int64
    return found


@functools.cache
def tf32_library() -> ctypes.CDLL:
    """Of the kernels on matrix units."""
    found = ctypes.CDLL(str(build(TESTS / "cuda" / "inner_loop" / "mlp_tf32.cu", "plain", "-shared")))
    for name in ("mtmlk_tf32_mlp_shared_bytes", "mtmlk_tf32_mlp_record"):
        getattr(found, name).restype = ctypes.c_int64
    for name in ("rounded_to_tf32", "rounded_by_the_unit"):
        getattr(found, name).restype, getattr(found, name).argtypes = ctypes.c_float, [ctypes.c_float]
    return found


@dataclass
class HostKernels:
    """Kernels whose device is the CPU; `rows` and `threads` of a launch, where they are not those of the policy."""

    multiprocessors: int = 132
    threads: int | None = None
    rows: int | None = None  # 0: for few tasks, 1: for many
    blocks: int = 2  # at most; of tiles, for each task
    sets: int | None = None
    order: int | None = None
    launches: int = 0
    entries: list[Any] = field(default_factory=list)  # which native code calls as long as it likes
    terms: int = 0  # of TF32, on matrix units

    def entry_of(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A function of the library."""
        if self.terms:
            assert dtype == torch.float32
            kind, _, rest = name.partition("mlp")
            return getattr(tf32_library(), f"mtmlk_{kind}tf32_mlp{rest}")
        return getattr(library(), f"{name}_in_double" if dtype == torch.float64 else f"mtmlk_{name}")

    def shapes(self, dtype: torch.dtype) -> list[MlpShape]:
        found: list[MlpShape] = []
        shape = MlpShape()
        entry = self.entry_of("mlp_shape")
        while entry(len(found), ctypes.byref(shape)):
            found.append(MlpShape.from_buffer_copy(shape))
        return found

    def chip(self, device: torch.device) -> Chip:
        return Chip(self.multiprocessors, 227 * KB, 228 * KB)

    def shared_bytes(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        return int(self.entry_of("mlp_shared_bytes", dtype)(shape, ctypes.byref(call)))

    def record(self, shape: int, call: MlpCall, dtype: torch.dtype) -> int:
        return int(self.entry_of("mlp_record", dtype)(shape, ctypes.byref(call)))

    def run_mlp(self, launch: MlpLaunch, call: MlpCall, device: torch.device) -> None:
        launch = MlpLaunch.from_buffer_copy(launch)
        a_task = call.tasks if self.shapes(torch.float32)[launch.shape].tile else 1  # of tiles, blocks of each task
        launch.blocks = a_task * min(self.blocks, launch.blocks // a_task)
        launch.threads = self.threads or launch.threads
        launch.back_threads = self.threads or launch.back_threads
        if self.rows is not None:
            launch.rows = self.shapes(torch.float32)[launch.shape].rows[self.rows]
        call.sets = self.sets or call.sets
        entry = self.entry_of("run_mlp", torch.float64 if launch.dtype else torch.float32)
        reason = Reason()
        with in_order(self.order):
            status = entry(ctypes.byref(launch), ctypes.byref(call), None, ctypes.byref(reason))
        if status != 0:
            raise RuntimeError(reason.text.decode())
        self.launches += 1

    def entry(self) -> int:
        def run(launch: int, call: int, stream: int, reason: int) -> int:
            try:
                self.run_mlp(MlpLaunch.from_address(launch), MlpCall.from_address(call), torch.device("cpu"))
            except RuntimeError as error:
                Reason.from_address(reason).text = str(error).encode()[:239]
                return 33  # MTMLK_CUDA_FAILED
            return 0

        self.entries.append(ENTRY(run))
        found = ctypes.cast(self.entries[-1], ctypes.c_void_p).value
        assert found is not None
        return found

    def sum_over_tasks(
        self, parts: Tensor, scale: Tensor | None, results: Sequence[Tensor | None], begins: Sequence[int]
    ) -> None:
        HostEngine().sum_over_tasks(parts, scale, results, begins)


@contextmanager
def with_kernels(kernels: HostKernels | None = None, lane: bool = True) -> Iterator[HostKernels]:
    """`cuda-host` is a backend inside, which runs perceptrons by these kernels."""
    kernels = kernels or HostKernels()
    form = CUDA_HOST if kernels.terms else None
    BACKENDS.register(backend(HostEngine(), Perceptrons(kernels, kernels.terms), lane, form))
    try:
        yield kernels
    finally:
        BACKENDS.unregister(CUDA_HOST)


def call_of(
    widths: Sequence[int], kind: Act = Act.RELU, needs: int = NEED_PARAMS | NEED_LR, **options: Any
) -> InnerLoopArgs:
    case = draft_case(mlp(widths, kind, CONSTANTS.get(kind)), **options)
    return InnerLoopArgs.of_schema(case.op_arguments(needs))


def run(a: InnerLoopArgs, kernels: HostKernels | None = None, backend: str = CUDA_HOST) -> Results:
    """Outputs and gradients, from a cotangent on the loss."""
    with with_kernels(kernels) as kernels:
        chosen = BACKENDS.named(backend)
        assert chosen.forward is not None and chosen.backward is not None
        loss, output, support_losses, _, carry = chosen.forward(a)
        cotangent = torch.linspace(0.5, 1.5, a.tasks, dtype=loss.dtype)
        params, lr, *_ = chosen.backward(cotangent, None, None, [], a, carry)
        assert kernels.launches == (1 if backend == CUDA_HOST else 0), "not the perceptron's kernel"
    return [loss, output, support_losses], [g for g in (*params, *lr) if g is not None]


def assert_equal(found: Results, expected: Results, most: float = 1e-9) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for got, right in zip(ours, theirs, strict=True):
            scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
            assert got.shape == right.shape
            assert not right.numel() or float((got - right).abs().max()) <= most * scale


def some(a: InnerLoopArgs, tasks: list[int]) -> InnerLoopArgs:
    assert a.query_y is not None
    sets = {"support_x": [a.support_x[0][tasks]], "query_x": [a.query_x[0][tasks]]}
    return a._replace(**sets, support_y=a.support_y[tasks], query_y=a.query_y[tasks])


def parts_of(a: InnerLoopArgs, kernels: HostKernels) -> list[Tensor]:
    """By task: loss, output, losses of the steps, gradients."""
    with with_kernels(kernels):
        forward = BACKENDS.named(CUDA_HOST).forward
        assert forward is not None
        loss, output, support_losses, _, carry = forward(a)
    return [loss, output, support_losses.transpose(0, 1), carry[0]]
