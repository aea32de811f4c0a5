"""Whether a call fits the device's memory, into how many tasks at a time it is cut where it does not, and what is said
where not even one does.

A schedule's planes are known before it runs, and their bytes grow with the tasks; nothing else of a call is large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import device as Device

from mtml_kernels.errors import DeviceMemoryError
from mtml_kernels.schedule.build import Plan, plan_of
from mtml_kernels.schedule.graphs import capturing
from mtml_kernels.schedule.loop import Given
from mtml_kernels.schedule.pieces import narrowed
from mtml_kernels.schema.inner_loop import InnerLoopArgs

__all__ = ["fits", "free_bytes", "in_words", "needed_bytes", "remark", "tasks_at_a_time"]

SMALL = 1 << 26  # bytes up to which nobody asks how many are free, which takes the driver some 20 microseconds
SHARE = 0.9  # of what is free that planes may take: the allocator rounds up, and has gaps


def free_bytes(device: Device) -> int | None:
    """What the allocator can still hand out; None where that is not known, as on the CPU, which has swap."""
    if device.type != "cuda" or capturing(device):
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - allocated
    return min(free + reserved - allocated, allowed)


def needed_bytes(plan: Plan, given: Given | None = None, carried: bool = False) -> int:
    """What a call's planes take at most: there and, with the planes that it reads of there, back.

    Args:
        plan: of the call.
        given: the cotangents; by default the usual ones.
        carried: the planes are there already, of the forward.
    """
    if not plan.a.needs:
        return plan.there.peak_bytes
    trip = plan.trip(given or plan.usually)
    if carried:
        return trip.back.peak_bytes
    return max(trip.there.peak_bytes, trip.there.kept_bytes + trip.back.peak_bytes)


def fits(needed: int, device: Device) -> bool:
    """Whether so many bytes are free, as far as is known."""
    free = None if needed <= SMALL else free_bytes(device)
    return free is None or needed <= SHARE * free


def tasks_at_a_time(a: InnerLoopArgs, plan: Plan, device: Device, given: Given | None = None) -> int:
    """As many as fit the memory that is free: T over a power of two, so that a few bytes more or less seldom cut in
    another place.

    Raises:
        DeviceMemoryError: not even one task fits.
    """
    size, needed = a.tasks, needed_bytes(plan, given)
    while not fits(needed, device):
        if size == 1:
            raise DeviceMemoryError(_words(a, 1, device, needed))
        size = -(-size // 2)
        needed = needed_bytes(plan_of(narrowed(a, range(size))), given)
    return size


def remark(a: InnerLoopArgs, device: Device) -> str:
    """What explain() says of a call that does not fit; empty where it does."""
    plan = plan_of(a)
    try:
        size = tasks_at_a_time(a, plan, device)
    except DeviceMemoryError as error:
        return str(error)
    if size == a.tasks:
        return ""
    most, free = needed_bytes(plan), free_bytes(device)
    return f"{size} tasks at a time: all {a.tasks} need {_size(most)}, of which {_size(free)} are free on {device}"


@contextlib.contextmanager
def in_words(a: InnerLoopArgs, device: Device) -> Iterator[None]:
    """The allocator's error as one that names what the call needs, and ways out.

    Raises:
        DeviceMemoryError: in place of torch.OutOfMemoryError, which it is too.
    """
    try:
        yield
    except DeviceMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        words = _words(a, a.tasks, device, needed_bytes(plan_of(a)))
        raise DeviceMemoryError(f"{words} PyTorch says: {error}") from error


def _words(a: InnerLoopArgs, tasks: int, device: Device, needed: int) -> str:
    """What so many tasks need."""
    of, free = "one task needs" if tasks == 1 else f"{tasks} tasks need", free_bytes(device)
    ways = [f"fewer steps than {a.spec.steps}"] if a.spec.steps > 1 else []
    ways += ["first_order=True"] if a.needs and not a.spec.first_order else []
    ways += ["a smaller query or support set", *(["fewer tasks in a batch"] if tasks > 1 else [])]
    ways += ['the model and data on the CPU, whose backend "cpu" keeps less of a step']
    return (
        f"inner_loop: {of} {_size(needed)} of memory on {device}, where {_size(free)} are free ({a.spec.steps} steps, "
        f"{a.support_samples} support samples). Ways out: {', '.join(ways)}."
    )


def _size(count: int | None) -> str:
    if count is None:
        return "an unknown number of bytes"
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 27 else f"{count / (1 << 20):.2f} MiB"
