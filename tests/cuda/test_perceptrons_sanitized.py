"""The perceptrons' kernels under ThreadSanitizer and AddressSanitizer; and without one of their barriers each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cases.cuda_host import COMMON, CSRC, FLAVOURS, ORDERS, build, compiler, missing, run

RUN = Path(__file__).parent / "inner_loop" / "mlp_run.cu"
FOLDER = Path("cuda") / "inner_loop" / "mlp"
BARRIER, WAIT = "__syncthreads();", "wait_for_earlier_launches();"
# With so many sets they run; -1: in tiles whose launches overlap.
KERNELS = {"kernel.cuh": ("1", "2"), "tile_kernel.cuh": ("0", "-1"), "tile_sums.cuh": ("0", "-1")}
# By their order in the files; of some blocks the second task or tile is at work.
MISSING = [
    (name, what, i)
    for name in KERNELS
    for what in (BARRIER, WAIT)
    for i in range((CSRC / FOLDER / name).read_text().count(what))
]
EVERY_DAY = (("kernel.cuh", BARRIER, 3), ("tile_kernel.cuh", BARRIER, 2), ("tile_kernel.cuh", WAIT, 0))


@pytest.mark.parametrize("sets", ["0", "-2"])
def test_launches_that_overlap_give_the_same(sets: str) -> None:
    overlapping = str(int(sets) - 1)
    assert run(build(RUN), "64", overlapping).report == run(build(RUN), "64", sets).report


@pytest.mark.parametrize(
    "sets", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("-3", "-2")), "-1", "0", "1", "2"]
)
def test_sanitizers_have_nothing_to_say(sets: str) -> None:
    expected = run(build(RUN), "64", sets).report
    for flavour in ("thread", "address"):
        for threads in ("32", "96"):
            done = run(build(RUN, flavour), threads, sets, order=2)
            assert done.errors == "" and done.report == expected, flavour


def without(name: str, what: str, which: int, folder: Path) -> Path:
    """The program without one of the barriers or waits, for ThreadSanitizer."""
    if reason := missing("thread"):
        pytest.skip(reason)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings"))
    kernel = folder / "csrc" / FOLDER / name
    pieces = kernel.read_text().split(what)
    kernel.write_text(what.join(pieces[: which + 1]) + ";" + what.join(pieces[which + 1 :]))
    target = folder / "program"
    include = [f"-I{folder / 'csrc' / 'include'}", f"-I{folder / 'csrc'}"]
    command = [*compiler(), *COMMON, *FLAVOURS["thread"], *include, "-x", "c++", str(RUN), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize(
    ("name", "what", "which"),
    [pytest.param(*each, marks=[] if each in EVERY_DAY else [pytest.mark.slow]) for each in MISSING],
)
def test_a_missing_barrier_or_wait_is_found(name: str, what: str, which: int, tmp_path: Path) -> None:
    program = without(name, what, which, tmp_path)
    # One run that finds it is enough: reports take longer than the kernels. Only launches that overlap need a wait.
    runs = ((sets, order) for sets in KERNELS[name] if what != WAIT or sets == "-1" for order in ORDERS)
    assert any("data race" in run(program, "64", sets, order=order).errors for sets, order in runs)
