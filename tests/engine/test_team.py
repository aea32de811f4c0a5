"""The engine's own threads: callers side by side under ThreadSanitizer, forked children, how many a call is worth."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases.cuda_host import compiler, missing
from cases.engine import ENGINE, draft_case, evaluate, mlp, on_threads, same_bits
from engine.test_engine_promises import ones_of, script
from fuzz.build import ROOT, compilation

from mtml_kernels import native
from mtml_kernels.checks import Sizes
from mtml_kernels.native.inner_loop import call_threads

THREADS = Path("/proc/self/task")
CALLERS = Path(__file__).parent / "team" / "callers.cpp"


# --- callers side by side ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def callers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with the engine's C ABI for float64 on the base instruction set, under ThreadSanitizer."""
    if reason := missing("thread"):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("callers")
    sources = [path for path in compilation.sources(("base",), root=ROOT) if path.parent.name != "bindings"]
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-pthread", "-fsanitize=thread", "-ffp-contract=off"]
    flags += ["-DMTMLK_HAVE_BASE", "-DMTMLK_SINGLE=double"]
    flags += [f"-I{ROOT / 'csrc' / name}" for name in ("include", ".", "cpu")]

    def compiled(source: Path) -> str:
        target = folder / ("-".join(source.relative_to(ROOT).with_suffix(".o").parts))
        subprocess.run([*compiler(), *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, CALLERS]))
    subprocess.run([*compiler(), *flags, *objects, "-o", str(folder / "callers")], check=True)
    return folder / "callers"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 70])  # more than there are places for jobs
def test_callers_side_by_side(callers: Path, count: int) -> None:
    """Bits as on one thread, and nothing for ThreadSanitizer to say."""
    done = subprocess.run(
        [str(callers), str(count), str(240 // count), "0"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.slow
def test_a_race_between_pieces_is_found(callers: Path) -> None:
    """The control."""
    done = subprocess.run([str(callers), "2", "20", "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "data race" in done.stderr


# --- forked children --------------------------------------------------------------------------------------------------


def fork_beside_calls() -> list[int]:
    """Children, and a child's child, while another thread is inside of calls; 0 where the bits are right and another
    thread was there to help."""
    case = draft_case(mlp([5, 40, 3]), tasks=9, support=20, steps=3)
    cotangents = ones_of(case)
    expected, end = evaluate(case, ENGINE, cotangents, threads=2), threading.Event()

    def call() -> None:
        while not end.is_set():
            evaluate(case, ENGINE, cotangents, threads=2)

    beside, statuses = threading.Thread(target=call), []
    beside.start()
    for _ in range(5):
        child = os.fork()
        if child == 0:
            deeper = os.fork()
            right = same_bits(evaluate(case, ENGINE, cotangents, threads=2), expected)
            right &= not THREADS.exists() or len(list(THREADS.iterdir())) > 1
            if deeper == 0:
                os._exit(0 if right else 1)
            os._exit(0 if right and os.waitpid(deeper, 0)[1] == 0 else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    end.set()
    beside.join()
    return statuses


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_children_have_threads_of_their_own() -> None:
    assert script("fork_beside_calls", module="engine.test_team") == [0] * 5


# --- threads by work --------------------------------------------------------------------------------------------------


def threads_of_calls() -> list[list[int]]:
    """Of two small calls and a large one, of 1, 2 and 64 threads that they may use."""
    found = []
    for sizes, widths in (
        (Sizes(4, 6, 6), [8, 8, 3]),
        (Sizes(25, 10, 10), [1, 40, 40, 1]),
        (Sizes(64, 25, 75), [784, 256, 5]),
    ):
        case = draft_case(mlp(widths), steps=1, tasks=1)
        row = []
        for most in (1, 2, 64):
            with on_threads(most):
                used, allowed = call_threads(case.params, case.lr, case.spec, sizes)
            assert allowed == most
            row.append(used)
        found.append(row)
    return found


def test_a_small_call_is_its_callers_alone() -> None:
    small, sinusoid, large = script("threads_of_calls", module="engine.test_team", MTML_THREAD_WORK="")
    assert small == [1, 1, 1] and large == [1, 2, 64]
    assert sinusoid[:2] == [1, 2] and 2 < sinusoid[2] <= 25


def test_the_tests_share_small_calls_too() -> None:
    assert threads_of_calls()[0] == [1, 2, 4]  # there are four tasks, of one chunk each


# --- many threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "tasks", "support", "expected"),
    [
        ([1, 40, 40, 1], 25, 10, 25),  # a thread a task
        ([784, 256, 5], 4, 5, 4),
        ([2, 64, 3], 4, 1024, 16),  # and of each task four chunks
        ([2, 64, 3], 1, 1024, 4),
        ([2, 64, 3], 24, 1024, 48),
        ([1, 40, 40, 1], 4096, 10, 64),
    ],
)
def test_tasks_and_their_chunks_go_to_64_threads(widths: list[int], tasks: int, support: int, expected: int) -> None:
    case = draft_case(mlp(widths), tasks=1, steps=1)
    with on_threads(64):
        used, _ = call_threads(case.params, case.lr, case.spec, Sizes(tasks, support, support))
    assert used == expected


@pytest.mark.parametrize(
    ("widths", "support"),
    [([3, 8, 2], 600), ([5, 300, 300, 3], 600), ([784, 256, 5], 5)],
    ids=["chunks", "wide", "low rank"],
)
@pytest.mark.parametrize("tasks", [1, 3, 4])
def test_bits_of_more_threads_than_tasks(widths: list[int], support: int, tasks: int) -> None:
    case = draft_case(mlp(widths), tasks=tasks, support=support, steps=2)
    cotangents = ones_of(case)
    expected = evaluate(case, ENGINE, cotangents, threads=1)
    for threads in (2, 7, 64):
        assert same_bits(evaluate(case, ENGINE, cotangents, threads=threads), expected)


@pytest.mark.parametrize("given", ["0", "-1", "many", "nan", "inf"])
def test_a_share_that_is_no_number_is_named(given: str) -> None:
    reason = script("unavailable", module="engine.test_team", MTML_THREAD_WORK=given)
    assert f"MTML_THREAD_WORK: expected multiply-adds a thread, at least 1, got {given!r}" in reason


def unavailable() -> str | None:
    return native.availability()
