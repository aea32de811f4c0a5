"""The perceptrons' kernel under ThreadSanitizer and AddressSanitizer; and without one of its barriers each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cases.cuda_host import COMMON, CSRC, FLAVOURS, ORDERS, build, compiler, missing, run

RUN = Path(__file__).parent / "inner_loop" / "mlp_run.cu"
KERNEL = Path("cuda") / "inner_loop" / "mlp" / "kernel.cuh"
BARRIER = "__syncthreads();"
# By their order in the file; one of the blocks takes two tasks.
BARRIERS = range((CSRC / KERNEL).read_text().count(BARRIER))


@pytest.mark.parametrize("sets", ["1", "2"])
def test_sanitizers_have_nothing_to_say(sets: str) -> None:
    expected = run(build(RUN), "64", sets).report
    for flavour in ("thread", "address"):
        for threads in ("32", "96"):
            done = run(build(RUN, flavour), threads, sets, order=2)
            assert done.errors == "" and done.report == expected, flavour


def without(which: int, folder: Path) -> Path:
    """The program without one of the barriers, for ThreadSanitizer."""
    if reason := missing("thread"):
        pytest.skip(reason)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings"))
    kernel = folder / "csrc" / KERNEL
    pieces = kernel.read_text().split(BARRIER)
    kernel.write_text(BARRIER.join(pieces[: which + 1]) + ";" + BARRIER.join(pieces[which + 1 :]))
    target = folder / "program"
    include = [f"-I{folder / 'csrc' / 'include'}", f"-I{folder / 'csrc'}"]
    command = [*compiler(), *COMMON, *FLAVOURS["thread"], *include, "-x", "c++", str(RUN), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("which", [pytest.param(i, marks=[] if i == 3 else [pytest.mark.slow]) for i in BARRIERS])
def test_a_missing_barrier_is_found(which: int, tmp_path: Path) -> None:
    program = without(which, tmp_path)
    runs = [run(program, "64", sets, order=order) for sets in ("1", "2") for order in ORDERS]
    assert any("data race" in each.errors for each in runs)
