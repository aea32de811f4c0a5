"""Launches of the persistent inner loop as pure numbers, for GPUs that need not be there; and what says why not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases.inner_loop import Case, make_case
from torch import Tensor, nn

from mtml_kernels.cuda import backends
from mtml_kernels.cuda.inner_loop import chip as chips
from mtml_kernels.cuda.inner_loop import device as device_module
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.describe import Launch, PerceptronLaunch, launch_of
from mtml_kernels.cuda.inner_loop.device import DeviceEngine
from mtml_kernels.cuda.inner_loop.words import RING_BYTES
from mtml_kernels.errors import BackendUnavailable
from mtml_kernels.native.cuda_device import Device, built_codes
from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.program import trace
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop import NEED_PARAMS, InnerLoopArgs, InnerLoopSpec
from mtml_kernels.schema.losses import LossSpec
from mtml_kernels.schema.update import UpdateSpec

TASKS = (1, 25, 58, 59, 132, 133, 4096)
# What PyTorch reports of them: multiprocessors, shared memory of a block at most, of a multiprocessor.
REPORTED = {"h200": (132, 232448, 233472), "a100": (108, 166912, 167936), "l4": (58, 101376, 102400)}


def of(name: str) -> Chip:
    return Chip.named(DEVICES[name])


@pytest.mark.parametrize("name", REPORTED)
def test_numbers_are_those_that_a_gpu_reports(name: str) -> None:
    assert of(name) == REPORTED[name]


def test_planes_have_all_of_a_multiprocessor_while_tasks_are_few() -> None:
    for name, (processors, block, everything) in REPORTED.items():
        chip = of(name)
        assert chip.planes(1) == chip.planes(processors) == block - RING_BYTES
        assert chip.planes(processors + 1) == chip.planes(4096) == everything // 4 - 1024 - RING_BYTES


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("tasks", TASKS)
def test_blocks_are_powers_of_two_of_threads_that_stay_on_the_chip(name: str, tasks: int) -> None:
    chip = of(name)
    assert 0 < chip.planes(tasks) <= chip.block_bytes - RING_BYTES
    for widest in (0, 1, 31, 64, 65, 200, 512, 100_000):
        threads = chip.threads(widest, tasks)
        assert threads in (32, 64, 128, 256) and (threads >= min(widest // 2, 128) or threads == 256)
        for full in (False, True):
            for asked in (RING_BYTES + 16, chip.planes(tasks) + RING_BYTES):
                blocks = chip.blocks(tasks, asked, threads, chips.REGISTERS[full])
                assert 1 <= blocks <= tasks
                each = -(-blocks // chip.multiprocessors)  # resident on one
                assert each * (asked + 1024) <= chip.bytes and each * threads <= 2048
                assert each * threads * chips.REGISTERS[full] <= 65536


# What the backend starts for a call is one of two.
def program_of(a: InnerLoopArgs, chip: Chip) -> Launch:
    found = launch_of(a, chip)
    assert isinstance(found, Launch)
    return found


@pytest.mark.skipif(not built_codes(), reason="built without CUDA")
def test_a_perceptron_of_known_widths_is_said() -> None:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    program, loss = trace(net, [(1,)]), LossSpec("mse")
    spec = InnerLoopSpec.of(program, [True] * 6, (loss, loss), steps=5)
    tensors = dict(net.named_parameters())
    params = [tensors[p.name].detach() for p in program.params]
    for tasks, rows in ((25, 2), (4096, 10)):
        x = torch.empty(tasks, 10, 1)
        a = InnerLoopArgs(params, [torch.ones(1)], [x], [x], [], [], x, x, None, None, None, spec, NEED_PARAMS)
        found = launch_of(a, of("h200"))
        assert isinstance(found, PerceptronLaunch) and found.rows == rows
        assert str(found).startswith("the kernel of perceptrons 1-40-40-1, ")
        assert 0 < found.shared_bytes <= 232448 and found.blocks <= tasks and found.workspace_bytes > 5 * 4 * 1761
        assert isinstance(launch_of(in_double(a), of("h200")), Launch)


def in_double(a: InnerLoopArgs) -> InnerLoopArgs:
    params, lr, x = ([t.double() for t in group] for group in (a.params, a.lr, a.support_x))
    return a._replace(params=params, lr=lr, support_x=x, query_x=x, support_y=x[0], query_y=x[0])


def call(case: Case, needs: int = NEED_PARAMS) -> InnerLoopArgs:
    lists = (case.params, case.lr, case.support_x, case.query_x, case.hyper, case.moments)
    return InnerLoopArgs(*lists, case.support_y, case.query_y, None, None, None, case.spec, needs)


def test_a_launch_has_no_more_than_the_chip() -> None:
    small = Chip(3, 12 * 1024, 13 * 1024)
    for dtype in (torch.float32, torch.float64):
        a = call(make_case(tasks=3, support=40, query=50, dtype=dtype))
        roomy, tight = program_of(a, of("h200")), program_of(a, small)
        assert roomy.workspace_bytes == 0 < tight.workspace_bytes
        assert tight.shared_bytes <= small.block_bytes and roomy.shared_bytes <= 232448
        assert roomy.blocks == tight.blocks == 3 and roomy.phases == tight.phases


def test_the_kernel_with_all_instructions_is_said() -> None:
    plain, full = (program_of(call(make_case(update=update)), of("h200")) for update in (None, UpdateSpec("adam")))
    assert (plain.full, full.full) == (False, True)
    assert str(plain).startswith("plain kernel, ") and str(full).startswith("full kernel, ")
    values = program_of(call(make_case(), needs=0), of("h200"))
    assert values.phases < plain.phases  # a call without gradients ends with the loss


def test_what_no_block_can_run_is_an_error_that_names_the_operation_and_the_way_out() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    program, loss = trace(net, [(1, 4, 4)]), LossSpec("mse")
    spec = InnerLoopSpec.of(program, [True] * 4, (loss, loss), steps=1)
    tensors, x, y = dict(net.named_parameters()), torch.empty(2, 3, 1, 4, 4), torch.empty(2, 3, 2)
    params = [tensors[p.name].detach() for p in program.params]
    a = InnerLoopArgs(params, [torch.ones(1)], [x], [x], [], [], y, y, None, None, None, spec, NEED_PARAMS)
    with pytest.raises(BackendUnavailable, match=r"'cuda' cannot run this: conv\.forward .*backend='triton'"):
        launch_of(a, of("h200"))


def test_a_build_without_cuda_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "built_codes", tuple)
    why = BACKENDS.status()["cuda"]
    assert why is not None and "MTML_CUDA=1 pip install" in why
    monkeypatch.setattr(backends, "built_codes", lambda: ("sm_90",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKENDS.status()["cuda"] == "no NVIDIA GPU that PyTorch can use"


def test_what_it_does_not_take_is_named() -> None:
    backend = BACKENDS.named("cuda")
    assert backend.supports("cuda", torch.float32) is backend.supports("cuda", torch.float64) is None
    assert "'cpu'" in str(backend.supports("cpu", torch.float32))
    assert "torch.bfloat16" in str(backend.supports("cuda", torch.bfloat16))


def test_the_automatic_choice_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Triton is not installed: it would refuse convolutions, which `torch` runs."""
    monkeypatch.setattr(backends, "built_codes", lambda: ("sm_90",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = BACKENDS.names()
    assert BACKENDS.named("cuda").refusal("cuda", torch.float32) is None
    assert names.index("triton") < names.index("torch") < names.index("cuda")
    assert BACKENDS.named("torch").refusal("cuda", torch.float32) is None


class NoDeviceCode(RuntimeError):
    pass


def test_no_code_for_the_gpu_names_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise NoDeviceCode("no kernel image")

    fake = SimpleNamespace(NoDeviceCode=NoDeviceCode, sum_over_tasks=refuse)
    h200 = Device("NVIDIA H200", (9, 0), 132, 232448, 1)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(device_module, "engine", lambda: fake)
    monkeypatch.setattr(device_module, "devices", lambda: [h200])
    monkeypatch.setattr(device_module, "built_codes", lambda: ("sm_80",))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    parts, results = torch.ones(2, 3), list[Tensor | None]([torch.empty(3)])
    with pytest.raises(BackendUnavailable, match=r"NVIDIA H200.* has code for sm_80.*MTML_CUDA_ARCHS=90 pip"):
        DeviceEngine().sum_over_tasks(parts, None, results, [0])
