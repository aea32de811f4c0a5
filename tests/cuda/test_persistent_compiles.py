"""The persistent inner loop compiled for GPUs: without a warning, and what its kernels take there."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases.cuda_host import CSRC
from cases.nvcc import Usage, compile_for, usage
from cases.triton_process import SHARED_KB

SPOKEN = """\
ptxas info    : Compiling entry function '_Z4a' for 'sm_90'
ptxas info    : Function properties for _Z4a
    56 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 56 bytes cumulative stack size, 96 bytes smem, 1024 bytes cmem[0]
ptxas info    : Compile time = 8277.734 ms
ptxas info    : Function properties for _Z1b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z1c
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read() -> None:
    assert usage(SPOKEN) == [
        Usage("_Z4a", 255, 56, 44, 96),
        Usage("_Z1b", None, 0, 0, 0),
        Usage("_Z1c", 32, 0, 0, 0),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float", "double"])
@pytest.mark.parametrize("capability", SHARED_KB)
def test_kernels_keep_what_they_compute_in_registers(capability: int, precision: str, tmp_path: Path) -> None:
    source = CSRC / "cuda" / "inner_loop" / f"in_{precision}.cu"
    verbose = compile_for(capability, source, tmp_path / "kernel.o", "-O3", "-Xptxas", "-v", "-c")
    found = [each for each in usage(verbose) if not each.name.startswith("__internal")]
    print(f"sm_{capability}: registers, bytes of stack, spilled, of named shared memory")
    for each in sorted(found):
        if each.registers is not None:
            print(f"{each.registers:4} {each.stack:4} {each.spilled:4} {each.shared:6}  {each.name}")
    assert len([each for each in found if "inner_loop_kernel" in each.name]) == 2  # a plain and a full one
    assert {each.name: (each.stack, each.spilled) for each in found if each.stack or each.spilled} == {}


MLP = CSRC / "cuda" / "inner_loop" / "mlp"
PARTS = sorted(MLP.glob("part_*.cu"))


def test_every_part_of_the_list_has_its_file() -> None:
    """What the list deals out, one file each compiles; without one the module has a symbol that nothing defines."""
    found = re.search(r"kMlpParts = (\d+);", (MLP / "list.cuh").read_text())
    assert found is not None
    assert [part.name for part in PARTS] == [f"part_{i}.cu" for i in range(int(found[1]))]
    for i, part in enumerate(PARTS):
        assert f"run_mlp_part<float, {i}>(" in part.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KB)
def test_perceptrons_keep_what_they_compute_in_registers(capability: int, tmp_path: Path) -> None:
    def compiled(part: Path) -> str:
        return compile_for(capability, part, tmp_path / f"{part.stem}.o", "-O3", "-Xptxas", "-v", "-c")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        every = [each for verbose in pool.map(compiled, PARTS) for each in usage(verbose)]
    found = [each for each in every if each.registers is not None and "mlp_" in each.name]
    print(f"sm_{capability}: registers", *(f"{each.registers:4} {each.name}" for each in sorted(found)), sep="\n")
    assert len([each for each in found if "mlp_kernel" in each.name]) == 8  # two widths, for few tasks and many
    assert len([each for each in found if "mlp_tile_kernel" in each.name]) == 4  # straight and bent, there and back
    assert len([each for each in found if "mlp_sum_kernel" in each.name]) == 2
    assert spilling(every) == {}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_KB)
def test_perceptrons_on_matrix_units_keep_what_they_compute_in_registers(capability: int, tmp_path: Path) -> None:
    every = usage(compile_for(capability, MLP / "in_tf32.cu", tmp_path / "kernel.o", "-O3", "-Xptxas", "-v", "-c"))
    found = [each for each in every if each.registers is not None and "mlp_" in each.name]
    print(f"sm_{capability}: registers", *(f"{each.registers:4} {each.name}" for each in sorted(found)), sep="\n")
    assert len([each for each in found if "mlp_tile_kernel" in each.name]) == 8  # and by one term of TF32 or by three
    assert len([each for each in found if "mlp_sum_kernel" in each.name]) == 2  # which those share
    assert spilling(every) == {}


def spilling(every: list[Usage]) -> dict[str, tuple[int, int]]:
    """By name, bytes of stack and those spilled, where there are any."""
    own = (each for each in every if not each.name.startswith("__internal"))
    return {each.name: (each.stack, each.spilled) for each in own if each.stack or each.spilled}
