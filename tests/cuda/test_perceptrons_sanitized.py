"""The perceptrons' kernels under ThreadSanitizer and AddressSanitizer; and without one of their barriers each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cases.cuda_host import COMMON, CSRC, FLAVOURS, ORDERS, build, compiler, missing, run

RUN = Path(__file__).parent / "inner_loop" / "mlp_run.cu"
FOLDER = Path("cuda") / "inner_loop" / "mlp"
BARRIER = "__syncthreads();"
KERNELS = {"kernel.cuh": ("1", "2"), "tile_kernel.cuh": ("0",), "tile_sums.cuh": ("0",)}  # with so many sets they run
# By their order in the files; of some blocks the second task or tile is at work.
BARRIERS = [(name, i) for name in KERNELS for i in range((CSRC / FOLDER / name).read_text().count(BARRIER))]
EVERY_DAY = (("kernel.cuh", 3), ("tile_kernel.cuh", 2))


@pytest.mark.parametrize("sets", [pytest.param("-1", marks=pytest.mark.slow), "0", "1", "2"])
def test_sanitizers_have_nothing_to_say(sets: str) -> None:
    expected = run(build(RUN), "64", sets).report
    for flavour in ("thread", "address"):
        for threads in ("32", "96"):
            done = run(build(RUN, flavour), threads, sets, order=2)
            assert done.errors == "" and done.report == expected, flavour


def without(name: str, which: int, folder: Path) -> Path:
    """The program without one of the barriers, for ThreadSanitizer."""
    if reason := missing("thread"):
        pytest.skip(reason)
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings"))
    kernel = folder / "csrc" / FOLDER / name
    pieces = kernel.read_text().split(BARRIER)
    kernel.write_text(BARRIER.join(pieces[: which + 1]) + ";" + BARRIER.join(pieces[which + 1 :]))
    target = folder / "program"
    include = [f"-I{folder / 'csrc' / 'include'}", f"-I{folder / 'csrc'}"]
    command = [*compiler(), *COMMON, *FLAVOURS["thread"], *include, "-x", "c++", str(RUN), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*each, marks=[] if each in EVERY_DAY else [pytest.mark.slow]) for each in BARRIERS],
)
def test_a_missing_barrier_is_found(name: str, which: int, tmp_path: Path) -> None:
    program = without(name, which, tmp_path)
    runs = [run(program, "64", sets, order=order) for sets in KERNELS[name] for order in ORDERS]
    assert any("data race" in each.errors for each in runs)
