"""What watches the Triton kernels finds each kind of fault: test_triton_inner_loop_rows.py runs it elsewhere."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import torch
import triton
import triton.language as tl
from cases.triton_watch import permuted, poison, unwritten, watched
from torch import Tensor

from mtml_kernels.triton.device import on

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_inner_loop_rows.py, which sets the interpreter up"


@triton.jit
def racy_kernel(x, size, BLOCK: tl.constexpr):
    """Adds to each block the next one, in place: what it finds there depends on the order of programs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = tl.load(x + at) + tl.load(x + (at + BLOCK) % size)
    tl.store(x + at, added)


@triton.jit
def stale_kernel(x, y, size, BLOCK: tl.constexpr):
    """Adds to memory that it should have written, and leaves the last element out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0.0), mask=at < size // 2)
    tl.store(y + at, tl.load(y + at, mask=at < size - 1, other=0.0) + 1.0, mask=at < size - 1)


@triton.jit
def atomic_kernel(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0))


def test_a_race_is_found() -> None:
    def launch() -> Tensor:
        x = torch.arange(64.0)
        with on(x.device):
            racy_kernel[(4,)](x, 64, 16)
        return x

    with watched() as watch:
        right = launch()
    assert {conflict.kind for conflict in watch.conflicts} == {"write-read"}
    different = []
    for seed in range(3):
        with permuted(seed):
            different.append(not torch.equal(launch(), right))
    assert any(different)


def test_memory_of_others_and_additions_in_any_order_are_found() -> None:
    whole = np.zeros(32, np.float32)
    y = torch.from_numpy(whole[:16])  # behind which there is memory that is not its own
    with watched() as watch:
        stale_kernel[(2,)](torch.zeros(32), y, 32, 16)
    assert "outside" in {conflict.kind for conflict in watch.conflicts}
    with watched() as watch:
        x, y = torch.ones(32), torch.zeros(1)
        with on(x.device):
            atomic_kernel[(2,)](x, y, 16)
    assert {conflict.kind for conflict in watch.conflicts} == {"atomic"} and y == 32


def test_what_is_read_before_it_is_written_and_what_is_not_written_is_found() -> None:
    y = poison(torch.empty(16))
    with watched() as watch, on(y.device):
        stale_kernel[(1,)](torch.zeros(16), y, 16, 16)
    assert unwritten(y) == 8 and y[:8].tolist() == [1.0] * 8
    assert {conflict.kind for conflict in watch.conflicts} == {"reused"}


def test_a_launch_on_whatever_device_is_the_current_one_is_found() -> None:
    x = torch.ones(32)
    for guarded in (True, False):
        with watched() as watch, on(x.device) if guarded else contextlib.nullcontext():
            racy_kernel[(1,)](x, 16, 16)
        assert {conflict.kind for conflict in watch.conflicts} == (set() if guarded else {"unguarded"})
