"""Whole programs of the persistent inner loop under ThreadSanitizer and AddressSanitizer; and programs with a fault
each, which these or the threads' orders find.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from cases.block_program import hazards, lives, merged, phases_of, words_of
from cases.call_random import in_dtype, random_call
from cases.cuda_engine import CHIP
from cases.cuda_host import ORDERS
from cases.cuda_replay import Launch, recorded, replay
from cases.network_calls import network_call

from mtml_kernels.cuda.inner_loop import program
from mtml_kernels.cuda.inner_loop.instructions import Instruction
from mtml_kernels.cuda.inner_loop.placing import Placed, placed

Phases = Sequence[Sequence[Instruction]]
NETWORKS = ["adam", "words", "masks"]
DTYPES = {"adam": torch.float32, "words": torch.float64, "masks": torch.float32}
PHASE_WORDS = 1024
every_network = pytest.mark.parametrize("name", NETWORKS)


@cache
def launch(name: str, dtype: torch.dtype | None = None, chip: int = CHIP) -> Launch:
    """Two tasks in one block."""
    found = recorded(network_call(name, 2, dtype or DTYPES[name]), 64, chip)
    return dataclasses.replace(found, blocks=1)


def bits(held: Launch, folder: Path, order: int = 0) -> str:
    return str(replay(held, folder, order=order).report["bits"])


# --- nothing to say ---------------------------------------------------------------------------------------------------


@every_network
def test_sanitizers_have_nothing_to_say(name: str, tmp_path: Path) -> None:
    held = launch(name)
    expected = bits(held, tmp_path)
    for flavour in ("thread", "address"):
        done = replay(held, tmp_path, flavour)
        assert done.errors == ""
        assert done.report == {"bits": expected}


def test_nor_where_planes_lie_in_the_workspace(tmp_path: Path) -> None:
    held = launch("masks", chip=0)
    assert held.workspace_elements > 0 == held.chip_elements
    for flavour in ("thread", "address"):
        done = replay(held, tmp_path, flavour)
        assert done.errors == "" and done.report["bits"] == bits(held, tmp_path)


def test_nor_about_random_programs(tmp_path: Path) -> None:
    """In both precisions, on chips with room for all planes, for some and for none."""
    calls = [a for seed in range(30) if (a := random_call(seed, seed % 8)).has_loss and a.spec.steps]
    assert len(calls) > 12
    for at, a in enumerate(calls[:12]):
        held = recorded(in_dtype(a, (torch.float32, torch.float64)[at % 2]), 64, (CHIP, 3000, 0)[at % 3])
        expected = bits(held, tmp_path)
        for flavour in ("thread", "address"):
            done = replay(held, tmp_path, flavour)
            assert done.errors == "" and done.report["bits"] == expected, at


# --- faults are found -------------------------------------------------------------------------------------------------


def without_barrier(held: Launch, which: int) -> Launch:
    """Without one of the barriers behind which a thread reads what others wrote, by how many such come before it."""
    phases = phases_of(held.words)
    kept = [
        at
        for at, (phase, after) in enumerate(itertools.pairwise(phases))
        if 4 + len(phase) + len(after) <= PHASE_WORDS and hazards(merged(phases, at)[at], held.tasks, by_all=True) > 0
    ]
    return dataclasses.replace(held, words=words_of(merged(phases, kept[which % len(kept)])))


@pytest.mark.parametrize("which", [0, 7, -1])
@every_network
def test_a_missing_barrier_is_a_race(name: str, which: int, tmp_path: Path) -> None:
    """ThreadSanitizer names the kernel; results differ from order to order."""
    faulty = without_barrier(launch(name, torch.float64), which)
    done = replay(faulty, tmp_path, "thread")
    assert done.status == 66 and "ThreadSanitizer: data race" in done.errors
    assert "csrc/cuda/inner_loop/" in done.errors


@every_network
def test_missing_barriers_make_orders_differ(name: str, tmp_path: Path) -> None:
    """From the right bits, and but for what is NaN in all of them from each other."""
    right = launch(name, torch.float64)
    (expected,) = {bits(right, tmp_path, order) for order in ORDERS}
    found = []
    for which in range(6):
        faulty = without_barrier(right, which)
        found.append({bits(faulty, tmp_path, order) for order in ORDERS})
        assert found[-1] != {expected}, which
    assert sum(len(several) > 1 for several in found) >= 4


@pytest.mark.parametrize("name", ["adam", "words"])
def test_a_chip_that_is_too_small_is_an_overrun(name: str, tmp_path: Path) -> None:
    held = launch(name)
    done = replay(dataclasses.replace(held, chip_elements=held.chip_elements - 4), tmp_path, "address")
    assert done.status == 1 and "use-after-poison" in done.errors


def test_a_workspace_that_is_too_small_is_an_overrun(tmp_path: Path) -> None:
    held = launch("masks", chip=0)
    padding = 7 + 3  # of the last row, to an odd number of vectors, and to ALIGNMENT: nobody touches it
    small = dataclasses.replace(held, workspace_elements=held.workspace_elements - padding - 2)
    done = replay(small, tmp_path, "address")
    assert done.status == 1 and "heap-buffer-overflow" in done.errors


def test_memories_that_overlap_change_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the largest on the chip at the place of another that lives with it."""
    a, found = network_call("adam", 2), set()
    right = bits(recorded(a, 64, CHIP), tmp_path)
    for which in range(6):

        def overlapping(phases: Phases, chip_bytes: int, which: int = which) -> Placed:
            where, alive = placed(phases, chip_bytes), lives(phases)
            one, *rest = sorted(where.chip, key=lambda m: -m.elements)[which:]
            other = next(m for m in rest if alive[m][0] <= alive[one][1] and alive[one][0] <= alive[m][1])
            return where._replace(chip={**where.chip, other: where.chip[one]})

        monkeypatch.setattr(program, "placed", overlapping)
        found.add(bits(recorded(a, 64, CHIP), tmp_path))
    assert len(found) == 6 and right not in found


@every_network
def test_a_tensor_that_is_too_small_is_an_overrun(name: str, tmp_path: Path) -> None:
    """A third of those that came or go out, each less its last element."""
    held = launch(name)
    there = [at for at, (content, _) in enumerate(held.tensors) if content is not None]
    for at in there[::3]:
        content, stride = held.tensors[at]
        assert content is not None
        tensors = [*held.tensors[:at], (content[:-4], stride), *held.tensors[at + 1 :]]
        done = replay(dataclasses.replace(held, tensors=tensors), tmp_path, "address")
        assert done.status == 1 and "heap-buffer-overflow" in done.errors, at
