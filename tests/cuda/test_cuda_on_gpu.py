"""The backend `cuda` of the inner loop on the GPU itself: the gate of ``python -m bench gpu`` for ``mtml:cuda``.

As tests/triton/test_on_gpu.py: the checks run on the CPU too, over a backend that is right and over one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases.cuda_engine import HostEngine, registered
from cases.cuda_mlp import call_of
from cases.on_gpu import ORDERS, SMALL, check_meta_step, check_order
from torch import Tensor, nn

from bench.gpu.precision import full_precision
from bench.report.predict import meta_step
from mtml import MAML, MetaOutput
from mtml_kernels.cuda.inner_loop.chip import Chip
from mtml_kernels.cuda.inner_loop.describe import launch_of
from mtml_kernels.cuda.inner_loop.device import DeviceKernels
from mtml_kernels.cuda.inner_loop.mlp import OVERLAP, Perceptrons
from mtml_kernels.functional import inner_loop
from mtml_kernels.native import engine
from mtml_kernels.ops.inner_loop import BACKENDS
from mtml_kernels.program import trace
from mtml_kernels.schedule.devices import DEVICES
from mtml_kernels.schema.inner_loop import InnerLoopArgs, Outputs

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif("cuda" not in BACKENDS.available(), reason=str(BACKENDS.status()["cuda"]))
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
WORKLOADS = [name for name in SMALL if name != "conv"]
SPILLS = "omniglot_mlp"  # its weights alone are larger than shared memory
SIZES = (3, 2, 3, 2)  # features of sx, sy, qx, qy
Batch = list[Tensor]


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    with full_precision():
        yield


@dataclass
class Problem:
    """A small network on a device, and what a call of it gives."""

    maml: MAML
    device: str

    @staticmethod
    def of(backend: str, device: str) -> Problem:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).to(device)
        return Problem(MAML(net, lr=0.1, steps=3, loss="mse", backend=backend), device)

    def batch(self, tasks: int = 4) -> Batch:
        return [torch.randn(tasks, 5, size, device=self.device) for size in SIZES]

    def gradients(self, batch: Batch) -> list[Tensor]:
        """The mean loss and its gradients."""
        loss = self.maml.meta_loss(*batch).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.maml.parameters()))]

    def of_each_task(self, batch: Batch) -> list[Tensor]:
        """What a call gives task by task: losses, outputs, gradients with respect to the inputs."""
        sx, sy, qx, qy = (t.clone() for t in batch)
        found = self.maml.meta_forward(sx.requires_grad_(), sy, qx.requires_grad_(), qy)
        own = torch.autograd.grad(found.loss.sum(), [sx, qx])
        return [found.loss.detach(), found.output.detach(), *own]


def check_tasks_alone(backend: str, device: str) -> None:
    """A task's results are the same bits with none, two and 299 tasks beside it."""
    problem = Problem.of(backend, device)
    many = problem.batch(300)
    together = problem.of_each_task(many)
    for cut in (slice(0, 1), slice(299, 300), slice(0, 3), slice(150, 153)):
        alone = problem.of_each_task([t[cut] for t in many])
        assert all(map(torch.equal, alone, (t[cut] for t in together))), f"tasks {cut}: other bits"


def check_stream(problem: Problem, late: Callable[[], None]) -> None:
    """On a stream of one's own the call waits for what that stream does before, and for nothing else."""
    wanted = problem.batch()
    given, plain = [torch.zeros_like(t) for t in wanted], problem.gradients(wanted)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(problem.device)):
        late()
        for t, right in zip(given, wanted, strict=True):
            t.copy_(right)
        found = problem.gradients(given)
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, plain))


def check_capture(problem: Problem) -> None:
    """A user's CUDA graph replays a call on other data."""
    first, second = problem.batch(), problem.batch()
    plain = [problem.gradients(batch) for batch in (first, second)]
    static = [t.clone() for t in first]
    side = torch.cuda.Stream(problem.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.gradients(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = problem.gradients(static)
    for batch, right in zip((second, first), reversed(plain), strict=True):
        for t, new in zip(static, batch, strict=True):
            t.copy_(new)
        graph.replay()
        assert all(map(torch.equal, found, right))


def check_lane(backend: str, device: str) -> None:
    """A call in the fast lane has the bits of the long way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).to(device)
    program, params = trace(net, [(3,)]), list(net.parameters())
    sx, sy, qx, qy = (torch.randn(4, 5, size, device=device) for size in SIZES)

    def call() -> list[Tensor]:
        options = {"steps": 3, "loss": "mse", "query_x": qx, "query_y": qy, "backend": backend}
        found = inner_loop(program, params, sx, sy, 0.1, **options)
        return [*(t.detach() for t in found[:3]), *torch.autograd.grad(found.loss, params, found.loss.detach().sin())]

    by_lane = [call() for _ in range(3)]
    chosen = BACKENDS.named(backend)
    assert any(known.lane is not None for known in chosen.fast_lane.checked.values()), "no lane"
    BACKENDS.register(replace(chosen, fast_lane=None))
    try:
        plain = call()
    finally:
        BACKENDS.register(chosen)
    assert all(torch.equal(a, b) for found in by_lane for a, b in zip(found, plain, strict=True)), "other bits"


# --- on the GPU -------------------------------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("name", WORKLOADS)
def test_inner_loop(name: str) -> None:
    """As float64, exact second order, the same bits again."""
    check_meta_step(SMALL[name], "mtml:cuda", "cuda")


@gpu
@needs_cuda
def test_planes_in_the_workspace() -> None:
    a = meta_step(SMALL[SPILLS])
    assert launch_of(a, Chip.of(torch.device("cuda", 0))).workspace_bytes > 0
    check_meta_step(SMALL[SPILLS], "mtml:cuda", "cuda")


@gpu
@needs_cuda
def test_a_task_does_not_see_the_others() -> None:
    check_tasks_alone("cuda", "cuda")


@gpu
@needs_cuda
@pytest.mark.parametrize("order", ORDERS)
def test_calls_in_any_order(order: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    check_order("cuda", "cuda", order, monkeypatch)


@gpu
@needs_cuda
def test_launches_that_overlap_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls find a GPU that is busy, the others one another."""
    a = InnerLoopArgs._make(on_gpu(each) for each in call_of([2, 64, 64, 64, 3], dtype=torch.float32, support=500))
    perceptrons, found = Perceptrons(DeviceKernels()), list[Outputs]()
    for overlap in ("0", *["1"] * 20):
        monkeypatch.setenv(OVERLAP, overlap)
        bound = perceptrons.bound(a)
        assert bound is not None and bound.tile
        torch.cuda._sleep(1_000_000)
        found.append(perceptrons.forward(a, bound))
    for one in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip((*found[0][:3], *found[0][4]), (*one[:3], *one[4]), strict=True))


def on_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [on_gpu(each) for each in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@gpu
@needs_cuda
def test_another_stream() -> None:
    check_stream(Problem.of("cuda", "cuda"), lambda: torch.cuda._sleep(20_000_000))


@gpu
@needs_cuda
def test_the_callers_own_graph() -> None:
    check_capture(Problem.of("cuda", "cuda"))


@gpu
@needs_cuda
def test_the_fast_lane() -> None:
    check_lane("cuda", "cuda")


@gpu
@needs_cuda
@two_gpus
def test_on_another_gpu_than_the_current_one() -> None:
    for name in WORKLOADS:
        check_meta_step(SMALL[name], "mtml:cuda", "cuda:1")
    check_tasks_alone("cuda", "cuda:1")
    check_lane("cuda", "cuda:1")
    assert torch.cuda.current_device() == 0


# --- the checks themselves, on the CPU --------------------------------------------------------------------------------


def test_workloads_are_those_that_a_block_can_run() -> None:
    """The one that is to spill does so on the largest chip."""
    for name in WORKLOADS:
        launch = launch_of(meta_step(SMALL[name]), Chip.named(DEVICES["h200"]))
        assert launch.threads > 0 and (launch.workspace_bytes > 0 or name != SPILLS)


def test_a_lane_that_is_right_passes() -> None:
    with registered() as name:
        check_lane(name, "cpu")


def test_a_lane_that_launches_nothing_fails() -> None:
    """What nobody writes is NaN there, as everywhere."""

    class Nothing(HostEngine):
        def functions(self) -> tuple[int, int]:
            found: tuple[int, int] = engine().no_launches()
            return found

    with registered(Nothing()) as name, pytest.raises(AssertionError, match="other bits"):
        check_lane(name, "cpu")


def test_tasks_that_are_alone_pass() -> None:
    check_tasks_alone("cpu", "cpu")


def test_tasks_that_see_the_others_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MAML.meta_forward

    def of_all(self: MAML, *batch: Tensor) -> MetaOutput:
        found = right(self, *batch)
        return found._replace(loss=found.loss + 1e-6 * len(batch[0]))

    monkeypatch.setattr(MAML, "meta_forward", of_all)
    with pytest.raises(AssertionError, match="other bits"):
        check_tasks_alone("cpu", "cpu")


@pytest.mark.parametrize("order", ORDERS)
def test_calls_in_any_order_pass(order: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    check_order("cpu", "cpu", order, monkeypatch)
