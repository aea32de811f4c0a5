"""Schedules recorded as CUDA graphs: a step of a small network is a hundred launches, and starting each takes longer
than it runs.

A *workspace* is one recorded way there and the ways back that read what it left. It has copies of all arguments, which
a call fills, and results that a call copies out, so that nothing outside is bound to an address and nothing that is
returned lies in it. A later forward may take the workspace of an earlier one whose backward has not been called: the
ticket that forward hands out names the workspace and the forward's number, and a backward whose number has passed goes
the way there again. Any order of calls is right; two forwards before their backwards are as fast, having a workspace
each.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mtml_kernels.schedule.call import Plane
from mtml_kernels.schedule.run import Bound

__all__ = ["CudaRecorder", "Graphs", "Recorder", "Ticket", "capturing", "wanted"]

WORKSPACES = 2  # of one schedule
MOST_WORKSPACES = 32
MOST_WARM = 1024  # schedules that are remembered as met
MOST_BYTES = 1 << 30  # of planes: beyond, calls take longer than their launches, and the memory is better given back
VARIABLE = "MTML_CUDA_GRAPHS"

Memory = list[Tensor | None]
Given = Callable[[Plane], Tensor]


class Recorder(Protocol):
    """Records work on a device and does it again."""

    def __call__(self, work: Callable[[], Memory], device: torch.device) -> tuple[Memory, Callable[[], None]]:
        """Where the results of `work`, which runs on the device, lie, and what computes them again."""


class CudaRecorder:
    """By torch.cuda.CUDAGraph, on whatever device the tensors lie: another one may be the current one."""

    def __call__(self, work: Callable[[], Memory], device: torch.device) -> tuple[Memory, Callable[[], None]]:
        with torch.cuda.device(device):
            work()  # kernels for the copies' own strides are compiled and loaded, which a capture does not allow
            graph = torch.cuda.CUDAGraph()
            # A stream of this device: PyTorch's own for captures is of the device that the process first captured on.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                memory = work()

        def replay() -> None:
            with torch.cuda.device(device):  # whose current stream it is that the graph starts on
                graph.replay()

        return memory, replay


class Ticket(tuple[int, int]):
    """(workspace, number of the forward), which travels among the saved tensors."""

    def tensor(self) -> Tensor:
        """As a tensor."""
        return torch.tensor(self, dtype=torch.int64)

    @staticmethod
    def of(carry: Sequence[Tensor]) -> Ticket | None:
        """What `tensor` made, or None where the carry is the planes themselves."""
        if len(carry) != 1 or carry[0].dtype != torch.int64 or tuple(carry[0].shape) != (2,):  # planes have more dims
            return None
        return Ticket(carry[0].tolist())


@dataclasses.dataclass
class _Recorded:
    bound: Bound
    inputs: dict[Plane, Tensor]
    memory: Memory
    replay: Callable[[], None]

    def run(self, given: Given) -> Memory:
        """With the arguments of a call."""
        if self.inputs:
            torch._foreach_copy_([*self.inputs.values()], [given(plane) for plane in self.inputs])
        self.replay()
        return self.memory


@dataclasses.dataclass
class _Workspace:
    there: _Recorded
    back: dict[int, _Recorded] = dataclasses.field(default_factory=dict)
    forwards: int = 0

    def kept(self, planes: Sequence[int]) -> dict[int, Tensor]:
        """Of the way there."""
        return {i: t for i in planes if (t := self.there.memory[i]) is not None}


class Graphs:
    """The recorded schedules of a backend. What is called for the first time is run plainly, by the caller: kernels are
    compiled and libraries loaded then, which a recording must not meet.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._warm: dict[int, Bound] = {}  # by id, which is theirs as long as they are held
        self._turns: dict[Hashable, int] = {}
        self._places: dict[Hashable, int] = {}
        self._workspaces: dict[int, _Workspace] = {}
        self._made = 0
        self._lock = threading.RLock()

    def forward(self, key: Hashable, bound: Bound, given: Given) -> tuple[Memory, Ticket] | None:
        """The planes after the way there, or None where it is met for the first time. `key`: of `wanted`."""
        with self._lock:
            if not self._is_warm(bound):
                return None
            turn = self._turns[key] = self._turns.get(key, 0) + 1
            place = key, id(bound), turn % WORKSPACES
            if self._places.get(place) not in self._workspaces:
                self._places[place] = self._new(bound, given)
            name = self._places[place]
            workspace = self._workspaces[name]
            workspace.forwards += 1
            return workspace.there.run(given), Ticket((name, workspace.forwards))

    def has_forward(self, key: Hashable, bound: Bound) -> bool:
        """Whether the next `forward` finds its planes in memory."""
        place = key, id(bound), (self._turns.get(key, 0) + 1) % WORKSPACES
        with self._lock:
            return id(bound) in self._warm and self._places.get(place) in self._workspaces

    def has_backward(self, ticket: Ticket, bound: Bound) -> bool:
        """Whether this `backward` does."""
        with self._lock:
            workspace = self._of(ticket)
            return workspace is not None and id(bound) in workspace.back

    def _is_warm(self, bound: Bound) -> bool:
        """Whether it was met before."""
        found = id(bound) in self._warm
        if len(self._warm) >= MOST_WARM:  # a workspace holds what it has recorded; the rest is met anew
            self._warm.clear()
            self._places = {place: name for place, name in self._places.items() if name in self._workspaces}
        self._warm[id(bound)] = bound
        return found

    def _new(self, bound: Bound, given: Given) -> int:
        if len(self._workspaces) >= MOST_WORKSPACES:
            del self._workspaces[next(iter(self._workspaces))]
        self._made += 1
        self._workspaces[self._made] = _Workspace(self._record(bound, given, {}))
        return self._made

    def backward(self, ticket: Ticket, bound: Bound, given: Given, kept: Sequence[int]) -> Memory | None:
        """The planes after the way back; None where the forward's planes are gone, or this way back is new."""
        with self._lock:
            workspace = self._of(ticket)
            if not self._is_warm(bound) or workspace is None:
                return None
            found = workspace.back.get(id(bound))
            if found is None:
                found = workspace.back[id(bound)] = self._record(bound, given, workspace.kept(kept))
            return found.run(given)

    def kept(self, ticket: Ticket, kept: Sequence[int]) -> dict[int, Tensor] | None:
        """The planes that a forward left, or None where they are gone."""
        with self._lock:
            workspace = self._of(ticket)
            return None if workspace is None else workspace.kept(kept)

    def _of(self, ticket: Ticket) -> _Workspace | None:
        name, forward = ticket
        workspace = self._workspaces.get(name)
        return workspace if workspace is not None and workspace.forwards == forward else None

    def _record(self, bound: Bound, given: Given, before: Mapping[int, Tensor]) -> _Recorded:
        inputs = {plane: given(plane).clone(memory_format=torch.contiguous_format) for _, plane in bound.arguments}
        device = next(iter(inputs.values())).device
        memory, replay = self._recorder(lambda: bound.run(inputs.__getitem__, before), device)
        return _Recorded(bound, inputs, memory, replay)


def capturing(device: torch.device) -> bool:
    """Whether the caller is recording a graph of their own on a GPU."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def wanted(device: torch.device, peak_bytes: int) -> Hashable | None:
    """Where graphs are recorded: a key of what else a recording depends on. None where calls run plainly.

    Plainly: outside CUDA, within a capture of the user's own, under autocast, with MTML_CUDA_GRAPHS=0, and where planes
    take more than 1 GiB.
    """
    if device.type != "cuda" or peak_bytes > MOST_BYTES or os.environ.get(VARIABLE, "1") == "0":
        return None
    if torch.is_autocast_enabled("cuda") or capturing(device):
        return None
    stream: Any = torch.cuda.current_stream(device)
    # By thread, because results are copied out of a workspace after the call has left the lock.
    return device.index, stream.cuda_stream, threading.get_ident(), torch.get_float32_matmul_precision()
