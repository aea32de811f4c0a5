"""Ctrl-C in a long native call: answered at once by every op and form, and the next call is as right as ever.

Before the engine looked at signals, an exception came when the call was over, however long that took.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mtml_kernels import native
from mtml_kernels.functional import head_inner_loop, inner_loop, task_conv2d, task_linear
from mtml_kernels.functional.linear_multihead_loss import linear_multihead_loss
from mtml_kernels.functional.multihead_loss import multihead_loss
from mtml_kernels.losses import HeadLoss
from mtml_kernels.native.linear_multihead_loss import Problem
from mtml_kernels.program import trace
from mtml_kernels.schema.inner_loop import NEED_PARAMS, InnerLoopSpec
from mtml_kernels.schema.linear_multihead_loss import LinearHead, Wants

LENGTH = 8.0  # seconds that the interrupted calls would take, roughly; they are never run to their end
INSIDE = 0.15  # the signal comes when the main thread has been at one place for so long: in the native call
SOON = 2.0  # a tenth of a second on a machine that does nothing else
Work = Callable[[], list[Tensor]]
Kind = Callable[[int], Work]  # a call that is the longer the larger the number

pytestmark = pytest.mark.skipif(native.availability() is not None, reason="needs the compiled engine")


def _meta_step(model: nn.Module, shape: tuple[int, ...], tasks: int, samples: int, steps: int, backend: str) -> Work:
    """A meta-step with cross-entropy on as many classes as the model has outputs, with its meta-gradient."""
    program = trace(model, [shape])
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    x, y = torch.randn(tasks, samples, *shape), torch.randint(program.output_shape[0], (tasks, samples))
    options: dict[str, Any] = {"steps": steps, "loss": "cross_entropy", "keep": "none", "backend": backend}

    def run() -> list[Tensor]:
        return [inner_loop(program, params, x, y, 1e-3, query_x=x, query_y=y, **options).loss]

    return run


def _mlp(features: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 5))


def _conv(groups: int = 1) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(4, 16, 3, groups=groups), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 49, 5))


def small_tasks(n: int) -> Work:
    return _meta_step(_mlp(4, 32), (4,), 8 * n, 5, 100, "cpu:weights")


def many_steps(n: int) -> Work:
    return _meta_step(_mlp(4, 32), (4,), 2, 5, 256 * n, "cpu:weights")


def shared_task(n: int) -> Work:
    """The threads share one task's samples."""
    return _meta_step(_mlp(16, 64), (16,), 1, 600, 2 * n, "cpu:weights")


def odd_tasks(n: int) -> Work:
    """A thread is left with a task when the others have none."""
    return _meta_step(_mlp(16, 64), (16,), torch.get_num_threads() + 1, 300, 2 * n, "cpu:weights")


def low_rank(n: int) -> Work:
    return _meta_step(_mlp(256, 256), (256,), 4 * n, 5, 3, "cpu:low_rank")


def convolutions(n: int) -> Work:
    return _meta_step(_conv(), (4, 16, 16), 1, 10, n, "cpu")


def grouped_convolutions(n: int) -> Work:
    return _meta_step(_conv(2), (4, 16, 16), 2, 10, n, "cpu")


def backward_run_again(n: int) -> Work:
    """The backward pass where the cotangents are not those that the forward pass carried."""
    program = trace(_mlp(16, 64), [(16,)])
    spec = InnerLoopSpec([True] * 4, list(program.ints), list(program.consts), 30, [1, 0], [1, 0], [0.0, 0.0], False, 0)
    params = [torch.randn(info.shape) / 8 for info in program.params]
    x, y = torch.randn(8 * n, 25, 16), torch.randint(5, (8 * n, 25))
    adapted, *rest = spec.values
    args = (params, adapted, [x], y, [x], y, None, None, [torch.tensor([1e-3])], [], [], None, *rest, NEED_PARAMS)
    cotangent = torch.ones(8 * n, 25, 5)
    return lambda: torch.ops.mtml.inner_loop_backward(None, cotangent, None, [], [], *args, [], "cpu")


def head_tasks(n: int) -> Work:
    x, y = torch.randn(4 * n, 200, 32), torch.randint(5, (4 * n, 200))
    weight, bias = torch.randn(5, 32, requires_grad=True), torch.zeros(5, requires_grad=True)
    call = partial(head_inner_loop, x, y, x[:, :5], weight, bias, 0.01, steps=50, query_labels=y[:, :5], form="gram")
    return lambda: [call().loss]


def head_chain(n: int) -> Work:
    """The backward pass of the head's inner loop."""
    x, y = torch.randn(n, 800, 800, requires_grad=True), torch.randint(5, (n, 800))
    weight, query = torch.randn(5, 800), torch.randn(n, 1, 800)
    call = partial(head_inner_loop, x, y, query, weight, None, 0.01, steps=1, query_labels=y[:, :1], form="gram")
    loss = call().loss.sum()
    return lambda: list(torch.autograd.grad(loss, [x], retain_graph=True))


def head_losses(n: int) -> Work:
    logits, target = torch.randn(8192, 2000), torch.randint(2000, (8192,))
    return lambda: [multihead_loss([logits] * n, [target] * n, "cross_entropy")]


def linear_head_losses(n: int) -> Work:
    x, weight, target = torch.randn(1024, 2048), torch.randn(256, 2048), torch.randint(256, (1024,))
    return lambda: [linear_multihead_loss(x, [weight] * n, None, [target] * n, "cross_entropy")]


def _linear_problem(n: int) -> Problem:
    weight, target = torch.randn(256, 2048), torch.randint(256, (1024,))
    head = LinearHead(0, HeadLoss("cross_entropy"), weight, None, target, None, None, None)
    return Problem(torch.randn(1024, 2048), [head._replace(place=i) for i in range(n)])


def linear_heads_keep(n: int) -> Work:
    problem = _linear_problem(n)
    return lambda: list(problem.keep())


def linear_heads_backward(n: int) -> Work:
    problem = _linear_problem(n)
    kept = torch.zeros_like(_linear_problem(1).keep()[1]).repeat(1, n)  # [N, classes of all heads]
    wants = Wants(True, [False] * n, [False] * n)

    def run() -> list[Tensor]:
        dx = problem.back(kept, [1.0] * n, wants)[0]
        assert dx is not None
        return [dx]

    return run


def linear_layers_of_tasks(n: int) -> Work:
    x, weight = torch.randn(n, 50, 2048), torch.randn(2048, 2048)
    return lambda: [task_linear(x, weight)]


def convolutions_of_tasks(n: int) -> Work:
    x, weight = torch.randn(n, 1, 256, 14, 14), torch.randn(256, 256, 3, 3)
    return lambda: [task_conv2d(x, weight)]


KINDS: list[tuple[Kind, float]] = [
    (small_tasks, LENGTH), (many_steps, LENGTH), (shared_task, LENGTH), (odd_tasks, LENGTH), (low_rank, LENGTH),
    (convolutions, LENGTH), (grouped_convolutions, LENGTH), (backward_run_again, LENGTH), (head_tasks, LENGTH),
    (head_chain, 1.0), (head_losses, LENGTH), (linear_head_losses, LENGTH), (linear_heads_keep, LENGTH),
    (linear_heads_backward, LENGTH), (linear_layers_of_tasks, LENGTH), (convolutions_of_tasks, LENGTH),
]  # fmt: skip


class Interrupted(NamedTuple):
    seconds: float  # from the signal to the exception
    error: BaseException | None


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> None:
    """Not here: filling memory takes seconds of its own, in which PyTorch looks at no signal."""


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """The handlers of Python's start; pytest's come back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _timed(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lasting(kind: Kind, seconds: float) -> tuple[int, float]:
    """How large a call takes at least so long, and how long it takes."""
    kind(1)()  # makes plans
    n = 1
    while (took := _timed(kind(n))) < seconds:
        n = math.ceil(n * min(8.0, max(2.0, 1.2 * seconds / took)))
    return n, took


def calibrated(kind: Kind, seconds: float) -> tuple[Work, Work]:
    """A short call, and one that takes about that long."""
    n, took = lasting(kind, 0.05)
    return kind(1), kind(math.ceil(n * seconds / took))


def interrupted(work: Work, number: int = signal.SIGINT) -> Interrupted:
    """Runs it, and sends the signal once it is in native code.

    Not earlier: what a handler raises while Python runs a destructor or a callback of its garbage collector, Python
    reports and forgets. On a busy machine the checks before a large call take long enough to be met.
    """
    sent: list[float] = []
    over = threading.Event()

    def send() -> None:
        place, since = None, time.perf_counter()
        while time.perf_counter() - since < INSIDE:
            if over.wait(0.01):
                return
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            if place != (id(frame), frame.f_lasti):
                place, since = (id(frame), frame.f_lasti), time.perf_counter()
        sent.append(time.perf_counter())
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    error: BaseException | None = None
    sender.start()
    try:
        work()
        over.set()
    except BaseException as caught:
        error = caught
    sender.join()
    assert sent, "the call was over before the signal came"
    return Interrupted(time.perf_counter() - sent[0], error)


@pytest.mark.parametrize(("kind", "seconds"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_ctrl_c_ends_a_long_call(kind: Kind, seconds: float) -> None:
    short, long = calibrated(kind, seconds)
    before = [t.clone() for t in short()]
    found = interrupted(long)
    assert isinstance(found.error, KeyboardInterrupt)
    assert found.seconds < min(SOON, seconds / 2)
    for old, new in zip(before, short(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("kind", [small_tasks, head_losses])
def test_a_handler_that_returns_lets_the_call_go_on(kind: Kind) -> None:
    n = lasting(kind, 0.4)[0]
    calls: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: calls.append(time.perf_counter()))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        start = end = 0.0
        while end - start < 0.4:  # on a machine that others use as well, the same call takes longer and less long
            long, n = kind(n), 2 * n
            calls.clear()
            start = time.perf_counter()
            found = long()
            end = time.perf_counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert sum(at < end - 0.01 for at in calls) > 1  # not only when the call was over
    assert all(torch.equal(a, b) for a, b in zip(long(), found, strict=True))


def test_the_exception_is_the_handlers_own() -> None:
    def stop(number: int, frame: object) -> None:
        raise SystemExit(f"signal {number}")

    signal.signal(signal.SIGTERM, stop)
    found = interrupted(calibrated(small_tasks, LENGTH)[1], signal.SIGTERM)
    assert isinstance(found.error, SystemExit) and str(found.error) == f"signal {int(signal.SIGTERM)}"
    assert found.seconds < SOON


def test_a_handler_may_call_the_engine() -> None:
    short, long = small_tasks(1), small_tasks(lasting(small_tasks, 0.3)[0])
    expected, inner, outer = short(), list[Tensor](), long()
    before = signal.signal(signal.SIGALRM, lambda number, frame: inner.extend(short()))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        found = long()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(inner[0], expected[0]) and torch.equal(found[0], outer[0])


def test_another_threads_call_goes_on() -> None:
    long = small_tasks(lasting(small_tasks, 0.3)[0])
    expected, found = long(), list[Tensor]()
    thread = threading.Thread(target=lambda: found.extend(long()))

    def wait() -> list[Tensor]:
        thread.start()
        time.sleep(60)
        return []

    assert isinstance(interrupted(wait).error, KeyboardInterrupt)
    thread.join()
    assert torch.equal(found[0], expected[0])
