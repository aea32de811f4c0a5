"""Programs of a thread block: their words are those of program.h, their phases and places leave nothing to chance."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.block_program import hazards, instructions, lives, merged, phases_of, touched, words_of
from cases.call_random import random_call
from cases.cuda_engine import CHIP, HostEngine
from cases.cuda_host import CSRC, build
from cases.network_calls import NETWORKS, network_call
from hypothesis import given, settings
from hypothesis import strategies as st

from mtml_kernels.cuda.inner_loop import encoding, placing, program
from mtml_kernels.cuda.inner_loop import words as names
from mtml_kernels.cuda.inner_loop.backend import Persistent
from mtml_kernels.cuda.inner_loop.encoding import divisor
from mtml_kernels.cuda.inner_loop.instructions import Instruction, Memory, Operand
from mtml_kernels.cuda.inner_loop.placing import Placed, TooLarge, placed
from mtml_kernels.cuda.inner_loop.program import BlockProgram
from mtml_kernels.schedule.build import plan_of
from mtml_kernels.schema.inner_loop import InnerLoopArgs

HEADER = (CSRC / "cuda" / "inner_loop" / "program.h").read_text()
FOLDER = Path(__file__).parent / "inner_loop"


def there_and_back(a: InnerLoopArgs, chip: int = CHIP) -> BlockProgram:
    """The program of a call's usual gradients."""
    return Persistent(lambda: HostEngine(chip=chip)).program(a, plan_of(a).usually)


# --- words ------------------------------------------------------------------------------------------------------------


def enumerators(name: str) -> list[str]:
    """The names of an enumeration of program.h, in their order, less those for another one."""
    found = re.search(rf"enum {name} : int32_t {{(.*?)}};", HEADER, re.DOTALL)
    assert found is not None
    each = [text.split("=") for text in re.sub(r"//.*", "", found[1]).split(",")]
    return [name.strip() for name, *value in each if name.strip() and not (value and value[0].strip().startswith("k"))]


def number(name: str) -> int:
    found = re.search(rf"\b{name} = (-?\d+)", HEADER)
    assert found is not None
    return int(found[1])


def test_operations_are_those_of_the_header() -> None:
    *operations, count = enumerators("ScheduleOp")
    assert count == "kScheduleOpCount"
    in_python = ["k" + "".join(map(str.capitalize, op.name.split("_"))) for op in names.ScheduleOp]
    assert operations == in_python
    assert [number(op) for op in operations] == [int(op) for op in names.ScheduleOp]
    assert number(count) == len(operations)


def test_sizes_are_those_of_the_header() -> None:
    assert enumerators("HeadWord").index("kHeadSize") == names.HEAD_WORDS
    assert enumerators("OperandWord").index("kOperandSize") == names.OPERAND_WORDS
    for name, value in (
        ("kPhaseWords", names.PHASE_WORDS),
        ("kMostTensors", names.MOST_TENSORS),
        ("kFirstTensor", names.FIRST_TENSOR),
        ("kAbsent", encoding._ABSENT),
        ("kOnChip", encoding._ON_CHIP),
        ("kInWorkspace", encoding._IN_WORKSPACE),
    ):
        assert number(name) == value, name


def test_words_are_read_back_as_they_were_written() -> None:
    for seed in range(20):
        words = there_and_back(random_call(seed, 6)).words
        phases = phases_of(words.words)
        assert len(phases) == words.phases and words.words[0] == words.first
        assert words_of(phases) == words.words
        assert max(4 + len(phase) for phase in phases) <= names.PHASE_WORDS


# --- divisors ---------------------------------------------------------------------------------------------------------

TOP = 2**31 - 1


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(FOLDER / "divisor.cu", "plain", "-shared")))


def quotients(d: int, n: np.ndarray) -> np.ndarray:
    """As kernels compute them."""
    n, found = n.astype(np.int32), np.full(n.shape, -1, np.int32)
    at = [ctypes.c_void_p(x.ctypes.data) for x in (n, found)]
    library().quotients(*divisor(d), at[0], len(n), at[1])
    return found


def test_quotients_are_exact_at_the_edges() -> None:
    """Around multiples of d and at both ends, of d around powers of two and of both ends."""
    around = {2**k + e for k in range(31) for e in (-1, 0, 1)}
    for d in sorted(d for d in {*around, *range(1, 300), TOP, TOP - 1} if 1 <= d <= TOP):
        last = TOP // d
        counts = np.unique(np.clip(np.array([0, 1, 2, 3, last // 2, last - 1, last]), 0, last)).astype(np.int64)
        n = np.unique(np.clip(np.r_[counts * d - 1, counts * d, counts * d + 1, TOP - 1, TOP], 0, TOP))
        assert (quotients(d, n) == n // d).all(), d


@settings(max_examples=200)
@given(st.integers(1, TOP), st.integers(0, 2**32 - 1))
def test_quotients_are_exact_at_random(d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = np.r_[rng.integers(0, TOP, 500), rng.integers(0, min(TOP, 10 * d), 500)]
    assert (quotients(d, n) == n // d).all()


# --- places -----------------------------------------------------------------------------------------------------------


def check_places(phases: Sequence[Sequence[Instruction]], where: Placed, chip_bytes: int) -> None:
    """Every memory is in one place, inside, aligned, and alone there as long as it lives."""
    alive = lives(phases)
    assert set(where.chip) | set(where.workspace) == set(alive) and not set(where.chip) & set(where.workspace)
    assert where.chip_bytes <= chip_bytes
    for places, size in ((where.chip, where.chip_bytes), (where.workspace, where.workspace_bytes)):
        spans = [(at, at + m.elements * m.dtype.itemsize, *alive[m]) for m, at in places.items()]
        assert all(start % placing.ALIGNMENT == 0 and end <= size for start, end, *_ in spans)
        for n, (start, end, first, last) in enumerate(spans):
            for other, until, begins, ends in spans[:n]:
                assert end <= other or until <= start or last < begins or ends < first


def random_phases(rng: random.Random) -> list[list[Instruction]]:
    """Memories of any size, in use from one phase to another."""
    count = rng.randint(1, 12)
    phases: list[list[Instruction]] = [[] for _ in range(count)]
    for _ in range(rng.randint(1, 40)):
        memory = Memory(rng.randint(1, 300), rng.choice([torch.float32, torch.float64]))
        operand = Operand(memory, 0, 0, 0, 0, 1)
        for at in {rng.randrange(count) for _ in range(rng.randint(1, 4))}:
            phases[at].append(Instruction(names.ScheduleOp.COPY, 1, memory.elements, (), (operand,)))
    return phases


@settings(max_examples=300)
@given(st.integers(0, 2**40))
def test_memories_that_live_at_once_lie_apart(seed: int) -> None:
    rng = random.Random(seed)
    phases, chip_bytes = random_phases(rng), rng.choice([0, 64, 1000, 5000, CHIP])
    check_places(phases, placed(phases, chip_bytes), chip_bytes)


def test_a_chip_of_less_than_nothing_is_too_small() -> None:
    with pytest.raises(TooLarge):
        placed(random_phases(random.Random(0)), -1)


def test_overlapping_places_are_noticed() -> None:
    """The control: any memory that is moved onto one that lives with it."""
    phases = random_phases(random.Random(5))
    where = placed(phases, CHIP)
    alive = lives(phases)
    one, *rest = where.chip
    other = next(m for m in rest if alive[m][0] <= alive[one][1] and alive[one][0] <= alive[m][1])
    with pytest.raises(AssertionError):
        check_places(phases, where._replace(chip={**where.chip, one: where.chip[other]}), CHIP)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What programs were placed of: (phases, where, chip bytes)."""
    found: list[Any] = []

    def spy(phases: Sequence[Sequence[Instruction]], chip_bytes: int) -> Placed:
        where = placed(phases, chip_bytes)
        found.append((phases, where, chip_bytes))
        return where

    monkeypatch.setattr(program, "placed", spy)
    yield found
    assert found


@pytest.mark.parametrize("chip_bytes", [0, 3000, CHIP])
@pytest.mark.parametrize("name", NETWORKS)
def test_memories_of_networks_lie_apart(name: str, chip_bytes: int, seen: list[Any]) -> None:
    there_and_back(network_call(name), chip_bytes)
    for phases, where, most in seen:
        check_places(phases, where, most)
        assert chip_bytes > 0 or not where.chip


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip_bytes", [0, 3000, CHIP])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_touched_twice_in_a_phase_where_it_is_written(name: str, chip_bytes: int) -> None:
    a = network_call(name)
    for phase in phases_of(there_and_back(a, chip_bytes).words.words):
        assert hazards(phase, a.tasks) == 0


def test_nor_in_random_programs() -> None:
    for seed in range(60):
        a = random_call(seed, seed % 10)
        for phase in phases_of(there_and_back(a).words.words):
            assert hazards(phase, a.tasks) == 0, seed


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_barrier_is_a_hazard(name: str) -> None:
    """The control: without it something is touched, or the two phases had too many words for one."""
    a = network_call(name)
    phases = phases_of(there_and_back(a).words.words)
    found = []
    for at, (phase, after) in enumerate(itertools.pairwise(phases)):
        found.append(hazards(merged(phases, at)[at], a.tasks) > 0)
        assert found[-1] or 4 + len(phase) + after[1] > names.PHASE_WORDS - 3, at
    assert sum(found) > len(found) / 2


def test_every_operation_is_among_the_programs() -> None:
    calls = [*map(network_call, NETWORKS), *(random_call(seed, seed % 10) for seed in range(60))]
    phases = [phase for a in calls for phase in phases_of(there_and_back(a).words.words)]
    hosts = [i for phase in phases for i in instructions(phase)]
    assert {i.op for host in hosts for i in (host, *host.stages)} == set(names.ScheduleOp)
    assert sum(len(touched(phase, 2).at) for phase in phases) > 100_000
