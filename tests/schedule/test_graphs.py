"""Recorded schedules: any order of forwards and backwards is right, and nothing that is returned lies in a recording.

A recorder on the CPU stands in for CUDA's: it runs the work again and writes its results where the first run left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases.engine import draft_case, mlp
from cases.inner_loop import Case
from torch import Tensor

from mtml_kernels.ops.inner_loop_backends import BACKENDS
from mtml_kernels.registry import Backend
from mtml_kernels.schedule import backend as scheduled
from mtml_kernels.schedule import graphs
from mtml_kernels.schedule.backend import Scheduled
from mtml_kernels.schedule.graphs import Graphs, Memory, Ticket
from mtml_kernels.schedule.run import Bound
from mtml_kernels.schedule.torch_kernels import TORCH


class Again:
    """A recorder that computes again what it recorded, into the same memory."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Memory], device: torch.device) -> tuple[Memory, Callable[[], None]]:
        self.recorded += 1
        memory = [None if t is None else t.clone() for t in work()]
        for t in memory:
            if t is not None and t.is_floating_point():
                t.fill_(float("nan"))  # a recording computes nothing

        def replay() -> None:
            self.replayed += 1
            for own, fresh in zip(memory, work(), strict=True):
                if own is not None and fresh is not None:
                    own.copy_(fresh)

        return memory, replay


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend "recorded": the schedule in PyTorch, recorded on the CPU."""
    recorder = Again()
    made = Scheduled(lambda schedule: Bound.of(schedule, TORCH), Graphs(recorder))
    monkeypatch.setattr(scheduled, "wanted", lambda device, peak: "here")
    BACKENDS.register(Backend("recorded", lambda: None, made.forward, made.backward))
    yield recorder
    BACKENDS.unregister("recorded")


def cases(count: int) -> list[Case]:
    """Calls of one form with numbers of their own."""
    return [draft_case(mlp([3, 5, 2]), steps=2, lr_scale=0.1 * (i + 1)).requiring_grad() for i in range(count)]


def run(case: Case, backend: str) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    """The losses, and their gradients when they are asked for."""
    loss = case.call(backend)[0]
    return loss, lambda: list(torch.autograd.grad(loss.sum(), case.params, retain_graph=True))


def expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    """By the plain schedule."""
    loss, gradients = run(case, "torch")
    return loss, gradients()


def same(found: tuple[Tensor, list[Tensor]], case: Case) -> None:
    loss, gradients = expected(case)
    assert torch.equal(found[0], loss)
    assert all(torch.equal(a, b) for a, b in zip(found[1], gradients, strict=True))


def test_calls_are_recorded_once_and_replayed(again: Again) -> None:
    for case in cases(6):
        loss, gradients = run(case, "recorded")
        same((loss, gradients()), case)
    assert again.recorded == 2 * graphs.WORKSPACES  # there and back
    assert again.replayed > again.recorded


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_forwards_before_backwards(again: Again, order: list[int]) -> None:
    """More of them than workspaces: whose planes are gone goes the way there again."""
    for _ in range(2):  # the second time everything is recorded
        every = cases(4)
        pending = [run(case, "recorded") for case in every]
        for i in order:
            loss, gradients = pending[i]
            same((loss, gradients()), every[i])


def test_a_graph_that_is_retained(again: Again) -> None:
    for case in cases(3):
        loss, gradients = run(case, "recorded")
        first, second = gradients(), gradients()
        same((loss, first), case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_are_nobodys_memory(again: Again) -> None:
    every = cases(5)
    found = [(loss, gradients()) for loss, gradients in (run(case, "recorded") for case in every)]
    for case, one in zip(every, found, strict=True):  # as they were, after all the others
        same(one, case)
    pointers = [t.data_ptr() for loss, gradients in found for t in (loss, *gradients)]
    assert len(set(pointers)) == len(pointers)


def test_other_cotangents_than_the_usual_ones(again: Again) -> None:
    for case in [draft_case(mlp([3, 5, 2]), steps=2, keep=1).requiring_grad() for _ in range(3)]:
        outputs, plain = case.call("recorded"), case.call("torch")
        totals = [o[0].sum() + sum(p.square().sum() for p in o[3]) for o in (outputs, plain)]
        ours, theirs = (torch.autograd.grad(total, case.params) for total in totals)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_many_forms_keep_to_a_limit(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_WORKSPACES", 2)
    for _ in range(3):
        for width in (4, 5, 6):
            case = draft_case(mlp([3, width, 2]), steps=1).requiring_grad()
            loss, gradients = run(case, "recorded")
            same((loss, gradients()), case)


def test_where_calls_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs.wanted(torch.device("cpu"), 0) is None
    cuda = torch.device("cuda", 0)
    assert graphs.wanted(cuda, graphs.MOST_BYTES + 1) is None
    monkeypatch.setenv("MTML_CUDA_GRAPHS", "0")
    assert graphs.wanted(cuda, 0) is None


def test_where_calls_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is none: the key is of what a recording depends on."""
    cuda, capturing = torch.device("cuda", 1), [False]
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    key = graphs.wanted(cuda, 0)
    assert isinstance(key, tuple) and key[:2] == (1, 7)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert graphs.wanted(cuda, 0) not in (None, key)
    capturing[0] = True
    assert graphs.wanted(cuda, 0) is None
    capturing[0] = False
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert graphs.wanted(cuda, 0) is None


class Gpus:
    """A stand-in for torch.cuda of several devices, one of them the current one. `seen`: what was done, and where."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.seen: list[tuple[str, int]] = []
        patch.setattr(torch.cuda, "device", self.on)
        patch.setattr(torch.cuda, "Stream", lambda device=None: self.current if device is None else device.index)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.do("replay")))
        patch.setattr(torch.cuda, "graph", self.capture)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == 2)

    def do(self, what: str) -> None:
        self.seen.append((what, self.current))

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: Any, stream: int = 0, capture_error_mode: str = "") -> Iterator[None]:
        """As PyTorch has it: on a stream of the device on which the first capture was, which may be another."""
        before, self.current = self.current, stream
        self.do("capture")
        yield
        self.current = before


def test_recorded_and_replayed_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not the current one."""
    gpus, device = Gpus(monkeypatch), torch.device("cuda", 1)

    def work() -> Memory:
        gpus.do("work")
        return []

    _, replay = graphs.CudaRecorder()(work, device)
    replay()
    assert gpus.seen == [("work", 1), ("capture", 1), ("work", 1), ("replay", 1)] and gpus.current == 0
    assert graphs.capturing(torch.device("cuda", 2)) and not graphs.capturing(device)


def test_what_was_met_is_forgotten_in_time(again: Again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_WARM", 3)
    for _ in range(4):
        for width in (4, 5, 6):
            case = draft_case(mlp([3, width, 2]), steps=1).requiring_grad()
            loss, gradients = run(case, "recorded")
            same((loss, gradients()), case)


def test_tickets() -> None:
    assert Ticket.of([Ticket((3, 4)).tensor()]) == (3, 4)
    assert Ticket.of([torch.zeros(2)]) is None and Ticket.of([]) is None
    assert Ticket.of([torch.zeros(1, 1, 1, 2, dtype=torch.int64)]) is None  # the indices of a pooling
